"""One server for everything: OpenAI's and DashScope's APIs and the web page, on one port, over one engine.

The event loop (app, openai_*, dashscope) never touches tensors; the engine's thread (bridge) never sees JSON.
"""
