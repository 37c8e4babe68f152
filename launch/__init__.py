"""Programs that launchers start: thin, and the only place that speaks submitit."""
