"""ferjax: facial-emotion classifiers from few labels, in JAX."""

__version__ = "0.1.0"
