"""The Gradio front end: it draws the event stream and decides nothing.

Only this folder and `app.py` import gradio, and the rest of the package runs without this folder. `format.py` and
`live_state.py` are plain Python: they import neither gradio nor torch.
"""
