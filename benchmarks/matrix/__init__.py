"""folora on other versions of what it stands on: `make matrix`."""
