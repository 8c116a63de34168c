"""The pool of scored samples, in exact reward quantiles."""
