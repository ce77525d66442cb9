"""The pages that people look at: of a training run, and of an evaluation. See docs/pages.md."""
