"""HTML pages and figures about runs and studies."""
