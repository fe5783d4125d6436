"""The version of the package, importable without JAX."""

__version__ = "0.2.0"
