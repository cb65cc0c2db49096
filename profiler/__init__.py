"""The offline job: calibration text, one pass, scores, selections, evidence, store."""
