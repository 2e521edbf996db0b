"""Rows in files: lines, lists, tables and archives, each read at any place in bounded memory."""
