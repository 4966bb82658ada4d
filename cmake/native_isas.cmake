# The instruction set that is the best for float32 on this machine, as the compiler knows it, and no
# other: half of what is compiled for all machines.
execute_process(
  COMMAND ${CMAKE_CXX_COMPILER} -march=native -dM -E -x c++ /dev/null
  OUTPUT_VARIABLE native_macros RESULT_VARIABLE native_failed)
if(native_failed)
  message(FATAL_ERROR "SNV2_CPU_ISAS=native: ${CMAKE_CXX_COMPILER} does not take -march=native")
endif()
function(snv2_all_native result)
  foreach(name ${ARGN})
    if(NOT native_macros MATCHES "#define __${name}__ 1")
      set(${result} FALSE PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${result} TRUE PARENT_SCOPE)
endfunction()
snv2_all_native(has_avx2 AVX2 FMA F16C)
snv2_all_native(has_avx512 AVX2 FMA F16C AVX512F AVX512BW AVX512DQ AVX512VL)
if(has_avx512)
  set(isas avx512)
elseif(has_avx2)
  set(isas avx2)
endif()
