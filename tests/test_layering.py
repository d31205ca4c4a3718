"""The arrows of DESIGN.md, read from the code itself: who may import whom, and what an import may start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*sorted((ROOT / "llmq").rglob("*.py")), ROOT / "app.py"]
}
# From the ground up: a package, or a module beside them, imports only from floors below its own.
FLOORS = [
    "llmq llmq.cgroup llmq.errors llmq.formatting llmq.hooks",
    "llmq.cache llmq.cards llmq.devices llmq.fields llmq.files llmq.scores llmq.terminal",
    "llmq.events llmq.kernels llmq.stored",
    "llmq.methods llmq.servers llmq.telemetry",
    "llmq.contestant llmq.models llmq.transformers",
    "llmq.convert llmq.engine llmq.environment llmq.levels llmq.parting",
    "llmq.formulas",
    "llmq.memory",
    "llmq.inspect llmq.machine",
    "llmq.figures",
    "llmq.classroom llmq.labs llmq.quantizing llmq.reporting llmq.summary",
    "llmq.bench llmq.face",
    "llmq.lesson llmq.sweeps llmq.tasks",
    "llmq.actions llmq.ui",
    "llmq.cli",
    "app llmq.__main__",
]
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages.split()}
# And so within the page.
PAGE = ["llmq.ui", "llmq.ui.shell", "llmq.ui.parts", "llmq.ui.api llmq.ui.tabs", "llmq.ui.layout", "llmq.ui.launch"]
PAGE_FLOOR_OF = {package: floor for floor, packages in enumerate(PAGE) for package in packages.split()}
# Modules of the page that are plain Python, among them whatever turns events into updates: tests of it need no server.
PLAIN = {"llmq.ui", "llmq.ui.parts", "llmq.ui.shell", "llmq.ui.tabs"}
PLAIN |= {
    f"llmq.ui.parts.{name}"
    for name in ("advice_card", "difference", "examples", "glossary", "live_state", "progress", "recording", "story")
}
PLAIN |= {"llmq.ui.parts.token_alignment", "llmq.ui.parts.verdict"}
PLAIN |= {f"llmq.ui.shell.{name}" for name in ("access", "address", "classroom", "guard", "guesses", "lessons")}
PLAIN |= {f"llmq.ui.shell.{name}" for name in ("link", "listening", "login", "owner", "quick_import", "state")}
PLAIN |= {f"llmq.ui.shell.{name}" for name in ("teaching", "wiring")}
PLAIN |= {f"llmq.ui.tabs.{name}" for name in ("compare_form", "compare_view", "fit_view")}


def imports_of(tree: ast.AST, module: str, *, is_package: bool) -> set[str]:
    """Every module that `tree` imports anywhere, also inside functions, by its full name.

    `from llmq import telemetry` counts as both 'llmq' and 'llmq.telemetry'. What only a type checker reads does not
    count.
    """
    package = module if is_package else module.rpartition(".")[0]
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def parse(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


IMPORTS = {name: imports_of(parse(name), name, is_package=SOURCES[name].name == "__init__.py") for name in SOURCES}


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def package_of(name: str, depth: int = 2) -> str:
    return ".".join(name.split(".")[:depth])


def arrows(depth: int = 2, inside: str = "") -> dict[str, set[str]]:
    """Package -> the packages it imports from, all of them `inside` one."""
    names = {name for name in SOURCES if not inside or within(name, (inside,))}
    found = {package_of(name, depth): set() for name in names}
    for name in names:
        here = package_of(name, depth)
        found[here] |= {package_of(module, depth) for module in IMPORTS[name] & names} - {here}
    return found


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    """Everything that `start` leads to; itself only when it is on a cycle."""
    found, ahead = set(), set(graph[start])
    while ahead:
        found |= ahead
        ahead = set().union(*(graph[node] for node in ahead)) - found
    return found


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of more than one node."""
    reached = {node: reach(graph, node) for node in graph}
    found = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return [set(component) for component in found]


def importers(*packages: str) -> set[str]:
    return {name for name, imported in IMPORTS.items() if any(within(module, packages) for module in imported)}


def test_the_reader_of_imports_sees_all_of_them():
    """A checker that overlooks an import would let everything pass."""
    source = (
        "import a.b, c\nfrom d import e\nif TYPE_CHECKING:\n    import unseen\n"
        "def f():\n    from . import g\n    from ..h import i\n"
        "    try:\n        import j as k\n    except ImportError: pass"
    )
    expected = {"a.b", "c", "d", "d.e", "p.q", "p.q.g", "p.h", "p.h.i", "j"}
    assert imports_of(ast.parse(source), "p.q.m", is_package=False) == expected
    assert "p.q.m.g" in imports_of(ast.parse("from . import g"), "p.q.m", is_package=True)


def test_every_source_is_read():
    assert {"llmq", "llmq.events", "llmq.engine.hf", "llmq.methods", "llmq.ui.layout", "app"} <= SOURCES.keys()


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("gradio", ("llmq.ui", "app")),
        ("plotly", ("llmq.figures", "llmq.ui")),
        ("triton", ("llmq.kernels",)),
        ("pynvml", ("llmq.telemetry",)),
        ("bitsandbytes", ("llmq.methods.bnb_int8", "llmq.methods.bnb_steps", "llmq.methods.nf4", "app")),
        ("spaces", ("app",)),
        ("huggingface_hub", ("llmq.models",)),
        ("gguf", ("llmq.models.gguf_convert",)),
        ("segno", ("llmq.ui.shell.classroom",)),
        ("sqlite3", ("llmq.classroom.store",)),
    ],
)
def test_a_library_stays_behind_its_module(library, allowed):
    assert {name for name in importers(library) if not within(name, allowed)} == set()


def test_every_package_has_its_floor():
    assert FLOOR_OF.keys() == arrows().keys()


@pytest.mark.parametrize("package", FLOOR_OF)
def test_arrows_point_down(package):
    assert {other for other in arrows()[package] if FLOOR_OF[other] >= FLOOR_OF[package]} == set()


def test_arrows_point_down_within_the_page():
    found = arrows(3, inside="llmq.ui")
    assert found.keys() == PAGE_FLOOR_OF.keys()
    up = {(a, b) for a, others in found.items() for b in others if PAGE_FLOOR_OF[b] >= PAGE_FLOOR_OF[a]}
    assert up == set()
    assert "llmq.ui.tabs" in found["llmq.ui.layout"] and "llmq.ui.shell" in found["llmq.ui.parts"]


def test_no_packages_import_each_other_in_a_circle():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a", "d"}}) == [{"b", "c"}]
    assert cycles(arrows()) == []


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("llmq.events", ("torch", "transformers")),
        ("llmq.figures", ("llmq.labs.compare", "llmq.engine", "llmq.kernels", "llmq.models", "torch", "transformers")),
    ],
)
def test_what_a_floor_alone_does_not_say(package, never):
    found = {name: sorted(m for m in IMPORTS[name] if within(m, never)) for name in SOURCES if within(name, (package,))}
    assert {name: modules for name, modules in found.items() if modules} == {}


def handlers(name: str):
    return [node for node in ast.walk(parse(name)) if isinstance(node, ast.ExceptHandler)]


def catches_everything(handler: ast.ExceptHandler) -> bool:
    names = (
        {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else {"Exception"}
    )
    return bool(names & {"Exception", "BaseException"})


def does_nothing(handler: ast.ExceptHandler) -> bool:
    return all(
        isinstance(s, ast.Pass | ast.Continue) or ast.unparse(s) in ("...", "return", "return None")
        for s in handler.body
    )


@pytest.mark.parametrize("name", SOURCES)
def test_no_failure_is_swallowed(name):
    assert [h.lineno for h in handlers(name) if h.type is None] == [], "bare except"
    assert [h.lineno for h in handlers(name) if catches_everything(h) and does_nothing(h)] == [], (
        "except Exception: pass"
    )
    calls = [ast.unparse(node) for node in ast.walk(parse(name)) if isinstance(node, ast.Call)]
    assert [
        call for call in calls if call.startswith(("suppress(", "contextlib.suppress(")) and "Exception)" in call
    ] == []


def test_the_reader_of_handlers_sees_the_bad_ones():
    bad = "try: f()\nexcept: pass\ntry: f()\nexcept (ValueError, Exception): continue\n"
    bad += "try: f()\nexcept BaseException: return"
    good = "try: f()\nexcept ValueError: pass\ntry: f()\nexcept Exception as e: log(e)"
    verdicts = [
        [
            catches_everything(h) and does_nothing(h)
            for h in ast.walk(ast.parse(code))
            if isinstance(h, ast.ExceptHandler)
        ]
        for code in (bad, good)
    ]
    assert verdicts == [[True, True, True], [False, False]]


def loaded_after(code: str) -> set[str]:
    """The top-level modules in memory after `code` ran in a fresh interpreter, and what it says about CUDA."""
    report = (
        "\nimport sys, threading\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
        "torch = sys.modules.get('torch')\n"
        "print('CUDA' if torch and torch.cuda.is_initialized() else 'none', threading.active_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    modules, state = done.stdout.splitlines()
    assert (state, done.stderr) == ("none 1", ""), "an import starts no CUDA, no thread, and says nothing"
    return set(modules.split())


def test_the_command_line_starts_without_torch():
    heavy = {"torch", "transformers", "bitsandbytes", "gradio", "plotly", "huggingface_hub", "numpy"}
    assert loaded_after("import llmq, llmq.cli, llmq.__init__\nllmq.cli.build_parser()") & heavy == set()


@pytest.mark.parametrize(("code", "never"), [
    ("dir(llmq)", {"numpy"}), ("llmq.METHODS, llmq.Run", {"numpy"}), ("llmq.compare, llmq.open_model", set()),
])  # fmt: skip
def test_the_face_is_imported_without_what_it_may_need_later(code, never):
    heavy = {"torch", "transformers", "bitsandbytes", "gradio", "plotly", "huggingface_hub", *never}
    assert loaded_after(f"import llmq\n{code}") & heavy == set()


def load(names) -> str:
    return "import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in sorted(names))


def test_no_core_module_loads_gradio_or_starts_cuda():
    shown = ("llmq.ui", "llmq.__main__", "app")
    loaded = loaded_after(load(name for name in SOURCES if not within(name, shown)))
    assert loaded & {"gradio", "plotly", "bitsandbytes"} == set()
    assert {"llmq", "torch"} <= loaded  # inspect's hooks need it; so the check above had something to see


def test_figures_load_no_gradio_no_torch_and_plotly_only_to_draw():
    loaded = loaded_after(load(name for name in SOURCES if within(name, ("llmq.figures",))))
    assert loaded & {"gradio", "torch", "plotly"} == set() and "numpy" in loaded
    drawn = loaded_after("from llmq.figures.style import new_figure\nnew_figure()")
    assert "plotly" in drawn


def test_plain_modules_of_the_page_load_no_gradio():
    graph = {name: IMPORTS[name] & SOURCES.keys() for name in SOURCES}
    direct = importers("gradio")
    free = {name for name in SOURCES if within(name, ("llmq.ui",)) and not ({name} | reach(graph, name)) & direct}
    assert free == PLAIN
    assert "gradio" not in loaded_after(load(PLAIN))


def test_every_operation_the_loop_asks_for_exists():
    """The operations are a namespace, so a name nobody has would be found on a GPU only."""
    from llmq.kernels import reference

    asked = {
        node.attr
        for name in SOURCES
        if within(name, ("llmq.engine", "llmq.methods"))
        for node in ast.walk(parse(name))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("kernels")
    }
    assert {"prompts_can_be_captured", "linear_rows", "product"} <= asked
    assert {name for name in asked if not hasattr(reference, name)} == set()
