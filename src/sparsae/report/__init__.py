"""A run as one HTML page: figures, tables and settings, which need nothing but the file itself."""
