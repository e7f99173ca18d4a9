"""Irregular time series: from pandas to numbers, and the models of them."""
