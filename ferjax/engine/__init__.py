"""Trains and scores; knows no method, model or data set by name."""
