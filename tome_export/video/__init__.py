"""Frames of video files. Imports nothing of this package: the server runs it as it is."""
