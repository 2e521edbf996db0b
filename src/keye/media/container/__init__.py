"""The structure of media files, read without decoding. Standard library and PyAV."""
