"""The Gradio front end: it draws the event stream and decides nothing.

`shell` launches the page and holds its state, `parts` are its components, `tabs` put them together. Only this folder
and `app.py` import gradio.
"""
