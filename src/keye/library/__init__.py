"""Many videos in folders: which are known, indexed or unreadable, and a search over all of them."""
