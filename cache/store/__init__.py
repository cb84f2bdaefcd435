"""The capture on disk: layout, writer, commits, reader, xarray view."""
