"""Recipes, observers, quantizers, calibration and training."""
