"""A typed function as an endpoint of Gradio's server: its parameters are checked, and a failure is one line."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI
from gradio.blocks import BlocksConfig
from gradio.state_holder import SessionState
from gradio.utils import get_function_description
from starlette.middleware import Middleware

from llmq.errors import BadChoice, UserError, first_line, unknown
from llmq.ui.shell.guard import Answers, Door, place_of
from llmq.ui.shell.guesses import Guesses
from llmq.ui.shell.wiring import owner_of

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
FAILED = "the server could not make sense of this; its log says more"
log = logging.getLogger(__name__)


def server_options(page: gr.Blocks, frames: tuple[str, ...]) -> dict:
    """What the web server is told: what stands in front of it, the sites that may show it in a frame, and JSON for MCP
    clients."""

    def own_hosts() -> list[str | None]:
        named = [page.share_url, os.environ.get("GRADIO_ROOT_PATH")]
        return [os.environ.get("SPACE_HOST"), *(urlsplit(address or "").netloc for address in named)]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.middleware_stack = Door(app.middleware_stack, own_hosts, Guesses())
        if page.mcp_server_obj:
            _as_json_text(page.mcp_server_obj)
        yield

    return {"middleware": [Middleware(Answers, frames=frames)], "lifespan": lifespan}


def name_wrong_values(page: gr.Blocks) -> None:
    """Say in one line that values given by their place are too few, or that one is no number; Gradio's own account of
    the former is a page long, and of the latter there is none."""

    def validate(function, inputs: list) -> None:
        if len(inputs) < len(function.inputs):
            told = f"{function.api_name} takes {len(function.inputs)} values and {len(inputs)} are given"
            raise gr.Error(f"{told}; call/v2/{function.api_name} takes them by name", print_exception=False)
        for component, value in zip(function.inputs, inputs, strict=False):
            if isinstance(component, gr.Slider) and type(value) not in (int, float):
                raise gr.Error(f"{component.label} is {json.dumps(value):.80}; give a number", print_exception=False)

    page.validate_inputs = validate  # no public setting


def fail_briefly(page: gr.Blocks) -> None:
    """Make whatever fails in an event of the page a sentence for the browser and a line in the log; Gradio prints the
    stack of everything, also of a value that a slider refuses."""
    whole = page.process_api

    async def process_api(block_fn, *given, **named):
        try:
            return await whole(block_fn, *given, **named)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:  # the boundary
            log.error("%s: %s", getattr(block_fn, "api_name", block_fn), place_of(error))
            raise gr.Error(FAILED, print_exception=False) from None

    page.process_api = process_api


def describe_once(page: gr.Blocks) -> None:
    """Describe each part of the page once, for all visitors: Gradio describes all parts anew for each, 0.04 seconds of
    the thread that serves everybody else, and keeps that with all that the visitor sees, 0.6 MB, for a link to it."""
    described = _Described(page)
    vars(described).update(vars(page.default_config), made={})
    page.default_config = described  # no public setting
    SessionState._update_value_in_config = _keep_no_value  # no public setting


def _keep_no_value(visitor: SessionState, number: int, value) -> None:
    """Leave a part's description as it is: the page's own links say what a visitor sees."""


class _Described(BlocksConfig):
    """What a page is made of, which remembers how its parts are described; so do its copies, one for every visitor.
    The descriptions are shared, and only to be read."""

    made: dict[int, tuple[gr.blocks.Block, dict]]

    def __copy__(self) -> BlocksConfig:
        copied = super().__copy__()
        copied.config_for_block = self.config_for_block
        return copied

    def config_for_block(self, number, rendered_ids, block, renderable=None) -> dict:
        if renderable:
            return super().config_for_block(number, rendered_ids, block, renderable)
        known, description = self.made.get(number, (None, {}))
        if known is not block:  # not yet described, or a visitor's own
            description = super().config_for_block(number, rendered_ids, block)
            self.made.setdefault(number, (block, description))
        return description


def _as_json_text(server) -> None:
    """Let MCP clients read an answer as JSON: Gradio sends them the text that Python shows of it."""
    whole = server.postprocess_output_data

    def postprocess(data: list, root_url: str) -> list:
        return whole([json.dumps(one) if isinstance(one, dict) else one for one in data], root_url)

    server.postprocess_output_data = postprocess  # no public setting


def add_endpoint(page: gr.Blocks, function: Callable, told: Mapping[str, str], **concurrency) -> None:
    """Make an endpoint of a function of `owner` and typed parameters, which describes itself in its docstring; `told`
    describes the parameters that this leaves out. A generator's items are streamed."""
    _, *parameters = inspect.signature(function, eval_str=True).parameters.values()
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)

    def given(request: gr.Request, values: tuple) -> dict:
        typed = {p.name: _typed(p.name, p.annotation, v) for p, v in zip(parameters, values, strict=True)}
        return typed | {"owner": owner_of(request)}

    def answered(request, *values):
        with _refusals():
            return function(**given(request, values))

    def streamed(request, *values):
        with _refusals(), closing(function(**given(request, values))) as items:
            yield from items

    endpoint = streamed if inspect.isgeneratorfunction(inspect.unwrap(function)) else answered
    endpoint.__name__ = function.__name__
    common = {p.name: told[p.name] for p in parameters if p.name in told}
    endpoint.__doc__ = _described(inspect.getdoc(function), common)
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD
    request = inspect.Parameter("request", place, annotation=gr.Request)
    endpoint.__signature__ = inspect.Signature(
        [request, *(parameter.replace(kind=place) for parameter in parameters)], return_annotation=dict
    )
    endpoint.__annotations__ = {p.name: p.annotation for p in (request, *parameters)} | {"return": dict}
    added = gr.api(endpoint, api_name=function.__name__, **concurrency)
    _, lines, _ = get_function_description(endpoint)
    for number, parameter in zip(added["inputs"], parameters, strict=True):
        page.blocks[number].label = lines[parameter.name]  # Gradio's is '1st'


def _described(doc: str, told: Mapping[str, str]) -> str:
    """A docstring with a line for every parameter."""
    start = doc.rstrip() if "Args:" in doc else f"{doc}\n\nArgs:"
    return "\n".join((start, *(f"    {name}: {text}" for name, text in told.items() if f"    {name}: " not in doc)))


@contextmanager
def _refusals() -> Iterator[None]:
    """Whatever goes wrong inside as an error of one line, in plain text."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:  # the boundary: a program gets a line, the log the rest
        log.exception("a question failed")
        raise gr.Error(f"{type(error).__name__}: {first_line(error)}", print_exception=False) from error


def _typed(name: str, hint: Any, value: Any) -> Any:
    """`value` as its parameter holds it. Raises BadChoice for another type: JSON from anywhere comes in here."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise unknown(name, value, get_args(hint))
        return value
    types = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if type(value) in types:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 63
    if number and float in types:
        return float(value)
    if number and int in types and value == int(value):
        return int(value)
    raise BadChoice(f"{name} is {json.dumps(value):.80}; give {' or '.join(WORDS[kind] for kind in types)}")
