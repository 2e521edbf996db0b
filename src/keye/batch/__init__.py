"""Questions of a manifest, answered by many workers, each record written once."""
