"""The Gradio front end: it draws the event stream and decides nothing.

From the ground up: `shell` is what all of it stands on (state, addresses, theme, endpoints), `parts` are its
components, `tabs` put them together, `layout` is the page, and `launch` serves it. Only this folder and `app.py` import
gradio.
"""
