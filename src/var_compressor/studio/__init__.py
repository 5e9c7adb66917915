"""A local web page that draws, compares and shows: an engine in plain Python under a thin page."""
