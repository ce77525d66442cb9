"""What evaluations leave behind, and what is told from it: tables, tests, figures."""
