# nvcc, called by custom commands.
#
# Not through CMake's CUDA language: that insists on linking a test program, which fails with the
# toolkit of NVIDIA's wheels (nvcc looks for its libraries in lib64, they are in lib); and only a
# command can declare the report of ptxas as its output.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/cuda_toolkit.py ${SNV2_NVCC}
  OUTPUT_VARIABLE toolkit ERROR_VARIABLE missing RESULT_VARIABLE status
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "CUDA kernels: ${missing}")
endif()
string(REPLACE "\n" ";" toolkit "${toolkit}")
list(GET toolkit 0 nvcc)
list(GET toolkit 1 cudart)

# What all kernels are compiled with.
set(snv2_nvcc_command ${nvcc} -ccbin ${SNV2_CUDA_HOST_COMPILER} -O3 -std=c++17
  --expt-relaxed-constexpr -lineinfo
  -Xcompiler -fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall,-Wextra
  -I${PROJECT_SOURCE_DIR}/csrc -I${PROJECT_SOURCE_DIR}/csrc/include)

# Objects of sources, by their places in the project, in `folder`:
# snv2_nvcc_objects(objects folder options... SOURCES sources...).
function(snv2_nvcc_objects objects folder)
  cmake_parse_arguments(PARSE_ARGV 2 given "" "" "SOURCES")
  set(made)
  foreach(source ${given_SOURCES})
    get_filename_component(name ${source} NAME)
    set(object ${folder}/${name}.o)
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${snv2_nvcc_command} ${given_UNPARSED_ARGUMENTS}
        -MD -MF ${object}.d -MT ${object} -c ${PROJECT_SOURCE_DIR}/${source} -o ${object}
      DEPENDS ${PROJECT_SOURCE_DIR}/${source} ${nvcc}
      DEPFILE ${object}.d
      COMMENT "nvcc ${source}"
      VERBATIM)
    list(APPEND made ${object})
  endforeach()
  set_source_files_properties(${made} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  set(${objects} ${made} PARENT_SCOPE)
endfunction()
