"""Reports: what was measured (:mod:`detent.report.record`) and how it is shown."""
