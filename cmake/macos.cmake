# Cross-compiles for Apple silicon with zig (PyPI's ziglang), which has macOS's headers and libraries.
# What it builds can be looked at, not run.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
find_program(SNV2_ZIG python-zig REQUIRED)
foreach(language C CXX)
  set(CMAKE_${language}_COMPILER_TARGET aarch64-macos)
endforeach()
set(CMAKE_C_COMPILER ${SNV2_ZIG} cc)
set(CMAKE_CXX_COMPILER ${SNV2_ZIG} c++)
set(CMAKE_INSTALL_NAME_TOOL ${CMAKE_COMMAND} CACHE FILEPATH "none: names are right when linked")
