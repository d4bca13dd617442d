"""The explorer: one HTML file in which a small model runs in the browser; see README.md."""
