"""The driver's side of the engines that generate."""
