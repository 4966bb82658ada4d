# The CUDA kernels on the emulator. Its own sources must not count their branches as steps.
add_library(snv2_for_emulator INTERFACE)
target_include_directories(snv2_for_emulator INTERFACE csrc csrc/include)
target_compile_definitions(snv2_for_emulator INTERFACE SNV2_EMULATED SNV2_GPU=emulated)
target_compile_options(snv2_for_emulator INTERFACE
  -Wall -Wextra -Wno-unknown-pragmas -fsanitize-coverage=trace-pc)
add_library(snv2_emulated_kernels OBJECT ${SNV2_CUDA_KERNELS})
set_source_files_properties(${SNV2_CUDA_KERNELS} PROPERTIES LANGUAGE CXX)
target_link_libraries(snv2_emulated_kernels PRIVATE snv2_for_emulator)
# To optimise more would take three times as long, and they would run a sixth faster.
target_compile_options(snv2_emulated_kernels PRIVATE -x c++ -O1)
if(SNV2_SANITIZE MATCHES "address")
  # The emulator knows all memory of a kernel, and to compile both takes four times as long.
  target_compile_options(snv2_emulated_kernels PRIVATE -fno-sanitize=address)
endif()
add_library(snv2_emulated SHARED
  csrc/emulator/access.cpp
  csrc/emulator/collectives.cpp
  csrc/emulator/counting.cpp
  csrc/emulator/fiber.cpp
  csrc/emulator/launch.cpp
  csrc/emulator/scheduler.cpp
  csrc/emulator/shadow.cpp
  csrc/emulator/sites.cpp
  csrc/emulator/transactions.cpp
  csrc/emulator/tsan.cpp
  csrc/program_gpu.cpp
  $<TARGET_OBJECTS:snv2_emulated_kernels>)
target_include_directories(snv2_emulated PRIVATE csrc)
target_link_libraries(snv2_emulated PUBLIC snv2_cpu)
target_compile_options(snv2_emulated PRIVATE -Wall -Wextra)
set_source_files_properties(csrc/program_gpu.cpp PROPERTIES
  COMPILE_DEFINITIONS "SNV2_EMULATED;SNV2_GPU=emulated")
if(SNV2_SANITIZE MATCHES "thread")
  # It sees what the kernels do, and of the emulator what csrc/emulator/tsan.h tells.
  target_compile_options(snv2_emulated PRIVATE -fno-sanitize=thread)
  target_compile_definitions(snv2_emulated PRIVATE SNV2_TSAN)
  target_compile_definitions(snv2_for_emulator INTERFACE SNV2_TSAN)
endif()
