"""A repository of the XLA FFI headers that come with an installed jaxlib."""

# find_spec runs no code of jaxlib.
_FIND = "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0], end='')"

_BUILD = """
cc_library(
    name = "ffi",
    hdrs = glob(["include/xla/ffi/api/*.h"]),
    includes = ["include"],  # as system headers: their warnings are not ours
    visibility = ["//visibility:public"],
)
"""

def _jaxlib_headers_impl(repository_ctx):
    python = repository_ctx.os.environ.get("PYTHON", "python3")
    found = repository_ctx.execute([python, "-c", _FIND])
    include = found.stdout + "/include"
    if found.return_code or not repository_ctx.path(include + "/xla/ffi/api/ffi.h").exists:
        fail("{0} has no jaxlib with headers: {0} -m pip install 'jaxlib>=0.10.2,<0.12' ".format(python) +
             "(or name another interpreter with --repo_env=PYTHON=...)")
    repository_ctx.symlink(include, "include")
    repository_ctx.file("BUILD", _BUILD)

jaxlib_headers = repository_rule(
    implementation = _jaxlib_headers_impl,
    environ = ["PYTHON"],
    local = True,
)
