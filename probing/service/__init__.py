"""The service's routes about probes: grids, cells, scores, and the page. No torch but in a process of its own."""
