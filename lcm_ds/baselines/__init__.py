"""Predictors that a model has to beat, and the targets that they share with it."""
