"""The pictures of each stage for the report page: `figures(result, folder)` draws what stands in the stage's `done.json`."""
