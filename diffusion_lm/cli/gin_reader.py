"""Reads gin files and flags with gin's own parser, one statement at a time, into gin and into a list of bindings.

Each binding records its file and line, and errors name them.
"""

import io
import re
import tokenize
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from gin import config as gin_config
from gin import config_parser
from gin.config_parser import BindingStatement, BlockDeclaration, ImportStatement, IncludeStatement

from diffusion_lm.cli import gin_names
from diffusion_lm.cli.bindings import Binding, Macro, Origin, Reference, Required, Unknown
from diffusion_lm.cli.search_path import find_gin_file
from diffusion_lm.core.errors import ConfigError
from diffusion_lm.core.files import is_bucket, read_text

T = TypeVar("T")
Statement: TypeAlias = BindingStatement | BlockDeclaration | ImportStatement | IncludeStatement

MACRO = "gin.macro"
_BARE_WORD = re.compile(r"[A-Za-z_./~][\w./:~+=@-]*")
_PYTHON_WORDS = {"true": "True", "false": "False", "none": "None", "null": "None"}
_AS = " as "
"""`include 'objectives/mdlm.gin as mdlm'` puts all bindings of the file into the scope `mdlm`, so that one
configuration can hold several objectives. The resolved configuration is plain gin."""


class _Delegate(gin_config.ParserDelegate):
    """Resolves references while gin parses a value, with error messages of this package.

    A reference with a scope replaces the current scope. In a file that is read into the scope `within`, such references
    therefore get `within/` as a prefix, as the bindings of the file do.
    """

    def __init__(self, context: gin_config.ParseContext, modules: Iterable[types.ModuleType] = (), *, within: str = ""):
        super().__init__()
        self._context, self._modules, self._within = context, modules, within

    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
        scopes, _, selector = scoped_selector.rpartition("/")
        scopes = f"{self._within}/{scopes}" if scopes and self._within else scopes
        selector, _ = gin_names.configurable(self._context, selector, self._modules)
        return super().configurable_reference(f"{scopes}/{selector}" if scopes else selector, evaluate)


class _SyntaxOnly(config_parser.ParserDelegate):
    """Parses a value to check its syntax only; resolves nothing."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        return None

    def macro(self, macro_name: str) -> None:
        return None


class GinReader:
    """Reads statements into gin and records where each one is.

    Attributes:
      bindings: all bindings in the order they were read.
      files: all files in the order they were read; a file that is included twice appears twice.
    """

    def __init__(self, search_path: tuple[str, ...]):
        self.bindings: list[Binding] = []
        self.files: list[Path] = []
        self._search_path = search_path
        self._modules: dict[str, types.ModuleType] = {}
        self._open: list[Path] = []

    def read_file(self, name: str, origin: Origin, where: str, scope: str = "") -> None:
        """Reads a file. With `scope`, all of its parameter bindings (not its macros) go into that scope."""
        path = find_gin_file(name, self._search_path, where=where)
        place = path if is_bucket(path) else path.resolve()
        if place in self._open:
            raise ConfigError(f"{name} includes itself", where=where, fix="Remove the include line.")
        self.files.append(path)
        self._open.append(place)
        with io.StringIO(read_text(path), newline=None) as stream, gin_config._parse_scope() as context:
            for statement, line in _statements(stream, _Delegate(context, within=scope), name):
                self._process(statement, context, f"{name}:{line}", origin, scope)
            # gin needs the imports to write the resolved configuration.
            gin_config._IMPORTS.update(context.imports)
        self._open.pop()

    def read_flag(self, text: str) -> None:
        """Reads one `NAME=VALUE` from the command line."""
        key, equals, value = (part.strip() for part in text.partition("="))
        where = f"--gin.{key}"
        if not equals or not key or not value:
            raise ConfigError(f"{where} has no value", fix="Write --gin.NAME=VALUE.")
        with gin_config._parse_scope() as context:
            context._enable_dynamic_registration()
            # A flag may use any class of any module that some file has imported.
            for module in self._modules:
                context.process_import(ImportStatement(module, False, None, None))
            modules = self._modules.values()
            scope, _, dotted = key.rpartition("/")
            if "." in dotted:
                short, parameter = dotted.rsplit(".", 1)
                selector, _ = _located(where, lambda: gin_names.configurable(context, short, modules, parameter))
                key = f"{scope}/{selector}.{parameter}" if scope else f"{selector}.{parameter}"
            line = f"{key} = {_with_quotes(value, where)}"
            for statement, _ in _statements(line, _Delegate(context, modules), where):
                self._process(statement, context, where, "command line")

    def _process(
        self,
        statement: Statement,
        context: gin_config.ParseContext,
        where: str,
        origin: Origin,
        within: str = "",
    ) -> None:
        match statement:
            case ImportStatement():
                module = _located(where, lambda: gin_names.import_module(context, statement))
                if module is not None:
                    self._modules[statement.module] = module
            case IncludeStatement():
                name, _, scope = statement.filename.partition(_AS)
                self.read_file(name, "included file", where, "/".join(part for part in (within, scope.strip()) if part))
            case BlockDeclaration():
                _located(where, lambda: gin_names.configurable(context, statement.selector, ()))
            case BindingStatement():
                if within and statement.arg_name:
                    scope = f"{within}/{statement.scope}" if statement.scope else within
                    statement = statement._replace(scope=scope)
                self._bind(statement, context, where, origin)

    def _bind(self, statement: BindingStatement, context: gin_config.ParseContext, where: str, origin: Origin) -> None:
        scope, selector, parameter, value, _ = statement
        if not parameter:
            name = f"{scope}/{selector}" if scope else selector
            key = (name, MACRO)
            self.bindings.append(Binding(name, "", "", _plain(value), None, where, origin))
        else:
            _, found = _located(where, lambda: gin_names.configurable(context, selector, ()))
            _located(where, lambda: gin_names.check_parameter(found.wrapped, parameter))
            key = (scope, found.selector)
            self.bindings.append(Binding(scope, found.selector, parameter, _plain(value), found.wrapped, where, origin))
        # As `gin.parse_config` does: gin stores a macro as the parameter `value` of `gin.macro`.
        gin_config._CONFIG.setdefault(key, {})[parameter or "value"] = value


def _statements(
    source: Iterable[str], delegate: config_parser.ParserDelegate, name: str
) -> Iterator[tuple[Statement, int]]:
    """Yields each statement and its line number; converts gin's syntax errors to `ConfigError` with file and line."""
    parser = None
    try:
        parser = config_parser.ConfigParser(source, delegate)
        while (statement := parser.parse_statement()) is not None:
            line = statement.location.line_num
            yield statement, line
    except SyntaxError as error:
        raise ConfigError(
            f"gin cannot parse {(error.text or '').strip()!r}: {str(error.msg).splitlines()[0].rstrip('.')}",
            where=_place(name, error.lineno),
            fix="Write Class.parameter = value, with strings in quotes.",
        ) from error
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise ConfigError(
            f"gin cannot parse the file: {message}", where=_place(name, line), fix="Close the bracket or string."
        ) from error
    except ConfigError as error:
        line = parser.current_token.start[0] if parser else 1
        raise ConfigError(error.what, where=error.where or _place(name, line), fix=error.fix) from error


def _place(name: str, line: int | None) -> str:
    return name if name.startswith("--gin.") else f"{name}:{line}"


def _located(where: str, call: Callable[[], T]) -> T:
    """Returns `call()`; a `ConfigError` without a place gets `where`."""
    try:
        return call()
    except ConfigError as error:
        raise ConfigError(error.what, where=error.where or where, fix=error.fix) from error


def _plain(value: object) -> Any:
    """Replaces gin's reference objects in a bound value by those of `bindings.py`."""
    if isinstance(value, gin_config.ConfigurableReference):
        if value.configurable.selector == MACRO:
            return Macro("/".join(value.scopes))
        if value.configurable.module == "gin":
            return Required() if value.scopes == ["gin.REQUIRED"] else Unknown()
        return Reference(value.configurable.wrapped, value.evaluate)
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value


def _with_quotes(value: str, where: str) -> str:
    """Returns the text of a value; a bare word, whose quotes the shell removed, is quoted again."""
    word = _PYTHON_WORDS.get(value.lower())
    if word and value != word:
        raise ConfigError(
            f"{value} is not a Python value", where=where, fix=f"Write {word}, or quote it: \"'{value}'\"."
        )
    if not word and _BARE_WORD.fullmatch(value):
        return repr(value)
    try:
        config_parser.ConfigParser(value, _SyntaxOnly()).parse_value()
    except (SyntaxError, tokenize.TokenError) as error:
        raise ConfigError(
            f"gin cannot parse the value {value}", where=where, fix=f"Quote a string twice: {where}=\"'...'\"."
        ) from error
    return value
