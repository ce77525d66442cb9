"""The pages that people look at: of trainings, evaluations and comparisons. See docs/pages.md."""
