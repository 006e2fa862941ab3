"""The report of a model: report.json and predictions.npz for programs, report.md and pictures for people."""
