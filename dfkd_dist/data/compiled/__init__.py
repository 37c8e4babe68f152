"""Sets of images compiled to one FFCV file, for what is read many times."""
