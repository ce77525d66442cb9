"""Where queries, passages and judgments come from."""
