"""Servers of the OpenAI protocol as contestants: their addresses, what they are asked, and what they answer. No torch.

The engines behind them are not ours: what a server does not tell is None. `served` names one, `dialects` says what each
kind takes, `reach` which may be asked and with which key, `protocol` what goes there and comes back, `connection` does
the talking.
"""
