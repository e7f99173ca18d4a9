"""What LatentODERegressor and LatentODEImputer are made of."""
