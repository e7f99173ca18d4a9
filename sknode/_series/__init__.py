"""Time series: panels of irregular observations and the models behind them."""
