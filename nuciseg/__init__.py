"""nuciseg trains, searches and runs networks that separate touching nuclei."""

__version__ = "0.1.0"
