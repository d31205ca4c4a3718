"""Models: names people can type, the demo model that needs no hub, and loading. The only place that downloads."""
