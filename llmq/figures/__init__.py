"""Findings as figures, and as HTML files: numbers in, plotly figures out. No gradio; llmq/ui shows the same figures."""
