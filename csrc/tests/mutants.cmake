# Copies of the shipped kernels with one fault each, in which the fault must be found.
#
# snv2_add_mutant(name [RACE] [TYPE type] FILE header OF source IN test CASES part
#                 TEXT old BECOMES new EXPECT words...)
#
# In csrc/FILE the TEXT, which must be there exactly once, is replaced by BECOMES; csrc/OF is compiled
# with that and takes the place of the same kernels in the test. Of the tests whose names contain
# CASES, the first that fails must say so with all the words of EXPECT. If it is a RACE,
# ThreadSanitizer must find it too. The copy is compiled for one storage type, that of the case which
# fails first: float, or the TYPE; "any" is all of them.

# From CMake 3.31 on, an empty BECOMES is told from a missing one, or warned of.
if(POLICY CMP0174)
  cmake_policy(SET CMP0174 NEW)
endif()
function(snv2_add_mutant name)
  cmake_parse_arguments(PARSE_ARGV 1 mutant "RACE" "TYPE;FILE;OF;IN;CASES;TEXT;BECOMES" "EXPECT")
  # Other sanitizers and processors have nothing to add.
  if(CMAKE_CROSSCOMPILING OR (SNV2_SANITIZE AND NOT (SNV2_SANITIZE MATCHES "thread" AND mutant_RACE)))
    return()
  endif()
  set(file ${PROJECT_SOURCE_DIR}/csrc/${mutant_FILE})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
  file(READ ${file} code)
  string(FIND "${code}" "${mutant_TEXT}" first)
  string(FIND "${code}" "${mutant_TEXT}" last REVERSE)
  if(first EQUAL -1 OR NOT first EQUAL last)
    message(FATAL_ERROR "mutant ${name}: not exactly once in csrc/${mutant_FILE}:\n${mutant_TEXT}")
  endif()
  string(REPLACE "${mutant_TEXT}" "${mutant_BECOMES}" code "${code}")
  set(copies ${CMAKE_CURRENT_BINARY_DIR}/mutants/${name})
  # What was left there when the fault was in another file would take that file's place.
  file(GLOB_RECURSE others RELATIVE ${copies} ${copies}/*)
  list(REMOVE_ITEM others ${mutant_FILE})
  foreach(other ${others})
    file(REMOVE ${copies}/${other})
  endforeach()
  file(CONFIGURE OUTPUT ${copies}/${mutant_FILE} CONTENT "${code}" @ONLY)

  set(source ${PROJECT_SOURCE_DIR}/csrc/${mutant_OF})
  if(mutant_OF STREQUAL mutant_FILE)
    set(source ${copies}/${mutant_FILE})
  endif()
  add_executable(mutant_${name} ${source})
  set_source_files_properties(${source} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++;-O0")
  target_include_directories(mutant_${name} BEFORE PRIVATE ${copies})
  if(NOT mutant_TYPE)
    set(mutant_TYPE float)
  endif()
  if(NOT mutant_TYPE STREQUAL any)
    target_compile_definitions(mutant_${name} PRIVATE SNV2_ONLY_TYPE=${mutant_TYPE})
  endif()
  target_link_libraries(mutant_${name} PRIVATE
    ${mutant_IN}_objects emulator_testing emulated_kernels)
  set(race)
  if(mutant_RACE)
    set(race --race)
  endif()
  add_test(NAME mutant_${name} COMMAND mutant_${name} ${race} ${mutant_CASES} ${mutant_EXPECT})
  set_tests_properties(mutant_${name} PROPERTIES LABELS emulator)
  add_dependencies(emulator_tests mutant_${name})
endfunction()

# Barriers and waits -------------------------------------------------------------------------

snv2_add_mutant(planes_without_wait
  FILE cuda/planes.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/strips
  TEXT [[    cp_async_commit();
    cp_async_wait<0>();
]] BECOMES [[    cp_async_commit();
]]
  EXPECT "read at planes.h" "cp.async" "cp_async_wait")

snv2_add_mutant(planes_without_barrier_after_load RACE
  FILE cuda/planes.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/strips
  TEXT [[    cp_async_wait<0>();
    sync_threads();
]] BECOMES [[    cp_async_wait<0>();
]]
  EXPECT "shared memory" "read at planes.h" "nobody wrote")

snv2_add_mutant(planes_without_barrier_before_store RACE
  FILE cuda/planes.h OF cuda/split_dw_cat_shuffle.cu IN kernels CASES split_dw_cat_shuffle/contiguous/strips
  TEXT [[    sync_threads();

    // Store.
]] BECOMES [[    // Store.
]]
  EXPECT "shared memory" "read at span.h" "nobody wrote")

snv2_add_mutant(strided_barrier_in_a_branch
  FILE cuda/strided.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3_stride2/contiguous/point
  TEXT [[  sync_threads();

  // Store.
]] BECOMES [[  if (threadIdx.x < 5) sync_threads();
]]
  EXPECT "waits in sync_threads" "strided.h" "which has ended")

snv2_add_mutant(strips_with_too_short_a_ring RACE
  FILE cuda/pixels.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/channels_last/strips
  TEXT "int ring_rows(int stride) { return 3 + stride; }"
  BECOMES "int ring_rows(int stride) { return 2 + stride; }"
  EXPECT "race: write at span.h" "read by" "pixel_march.h")

snv2_add_mutant(strips_that_wait_for_too_few
  FILE cuda/pixels.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/channels_last/march
  TEXT "cp_async_wait<kAhead - 1>();" BECOMES "cp_async_wait<kAhead>();"
  EXPECT "read at pixel_march.h" "cp_async_wait")

snv2_add_mutant(strips_without_barrier_before_a_row RACE
  FILE cuda/pixels.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/channels_last/march
  TEXT [[      cp_async_wait<kAhead - 1>();
      sync_threads();
]] BECOMES [[      cp_async_wait<kAhead - 1>();
]]
  EXPECT "shared memory")

snv2_add_mutant(strips_without_barrier_before_store RACE
  FILE cuda/pixels.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/channels_last/march
  TEXT [[      if (!wanted) continue;
      sync_threads();
]] BECOMES [[      if (!wanted) continue;
]]
  EXPECT "shared memory" "span.h")

snv2_add_mutant(images_without_wait
  FILE cuda/pixels.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/channels_last/plane
  TEXT [[        images * height * row_elements);
    cp_async_commit();
    cp_async_wait<0>();
]] BECOMES [[        images * height * row_elements);
    cp_async_commit();
]]
  EXPECT "read at pixel_march.h" "cp.async" "cp_async_wait")

snv2_add_mutant(strided_without_barrier_after_load RACE
  FILE cuda/strided.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3_stride2/contiguous/tiles
  TEXT [[  cp_async_wait<0>();
  sync_threads();
]] BECOMES [[  cp_async_wait<0>();
]]
  EXPECT "shared memory" "read at strided.h" "nobody wrote")

snv2_add_mutant(spread_without_wait
  FILE cuda/alternate.h OF cuda/cat_shuffle.cu IN kernels CASES cat_shuffle/contiguous
  TEXT [[  cp_async_wait<0>();
  sync_warp();
]] BECOMES [[  sync_warp();
]]
  EXPECT "read at alternate.h" "cp.async" "cp_async_wait")

snv2_add_mutant(spread_without_barrier RACE
  FILE cuda/alternate.h OF cuda/cat_shuffle.cu IN kernels CASES cat_shuffle/contiguous
  TEXT [[  sync_threads();

  // Store.
]] BECOMES [[  // Store.
]]
  EXPECT "shared memory" "read at span.h" "nobody wrote")

snv2_add_mutant(columns_without_barrier_after_load RACE
  FILE cuda/columns.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/tiles
  TEXT [[  cp_async_wait<0>();
  sync_threads();
]] BECOMES [[  cp_async_wait<0>();
]]
  EXPECT "shared memory" "read at columns.h" "nobody wrote")

snv2_add_mutant(columns_overwritten_too_early RACE
  FILE cuda/columns.h OF cuda/split_dw_cat_shuffle.cu IN kernels CASES split_dw_cat_shuffle/contiguous/tiles
  TEXT [[  sync_threads();

  // Store.
]] BECOMES [[  // Store.
]]
  EXPECT "shared memory" "alternate.h")

# Halos and edges ----------------------------------------------------------------------------

snv2_add_mutant(planes_without_upper_halo
  FILE cuda/planes.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/strips
  TEXT "begin * stride_of(kMain) - 1" BECOMES "begin * stride_of(kMain)"
  EXPECT "wrong result")

snv2_add_mutant(planes_without_lower_halo
  FILE cuda/planes.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/strips
  TEXT "(end - 1) * stride_of(kMain) + 2" BECOMES "(end - 1) * stride_of(kMain) + 1"
  EXPECT "wrong result")

snv2_add_mutant(planes_with_too_small_a_margin
  FILE cuda/planes.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/strips
  TEXT "kMain == Main::kStride1 ? width + 1 : 0;" BECOMES "kMain == Main::kStride1 ? width : 0;"
  EXPECT "shared memory" "nobody wrote" "planes.h")

snv2_add_mutant(images_above_the_first_row
  FILE cuda/pixel_march.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/channels_last/plane
  TEXT "last >= 0 && last < height;" BECOMES "last < height;"
  EXPECT "shared load" "is outside")

snv2_add_mutant(march_past_the_last_column
  FILE cuda/pixel_march.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/channels_last/tiles
  TEXT "from, kInputs - 1 < inputs_);" BECOMES "from, true);"
  EXPECT "shared memory" "read at pixel_march.h" "nobody wrote")

snv2_add_mutant(march_without_the_row_above
  FILE cuda/pixels.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/channels_last/march
  TEXT [[    march.restart();
    int row = row0 - March::kBefore;
]] BECOMES [[    march.restart();
    int row = row0 - 1;
]]
  EXPECT "wrong result")

snv2_add_mutant(strided_past_the_last_plane
  FILE cuda/strided.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3_stride2/contiguous/march
  TEXT "left_over < params.tile ? left_over : params.tile" BECOMES "params.tile"
  EXPECT "global" "outside all buffers" "span.h")

snv2_add_mutant(strided_without_guard
  FILE cuda/strided.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3_stride2/contiguous/pairs/float16
  TYPE half_t
  TEXT "if (threadIdx.x == 0) store(source + -1, T{});" BECOMES " "
  EXPECT "shared memory" "nobody wrote" "strided.h")

snv2_add_mutant(strided_without_the_row_above TYPE half_t
  FILE cuda/strided.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3_stride2/contiguous/march/float16
  TEXT "row > 0, 2 * (row + rows)" BECOMES "false, 2 * (row + rows)"
  EXPECT "wrong result")

snv2_add_mutant(direct_past_the_last_row
  FILE cuda/span.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/direct
  TEXT "row + dy >= op.height" BECOMES "row + dy > op.height"
  EXPECT "global load" "outside all buffers" "span.h")

# Indices ------------------------------------------------------------------------------------

snv2_add_mutant(planes_with_the_next_tap
  FILE cuda/planes.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/strips
  TEXT "const float w = load(weight + tap);" BECOMES "const float w = load(weight + (tap + 1) % 9);"
  EXPECT "wrong result")

snv2_add_mutant(planes_with_the_next_lane
  FILE cuda/planes.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3_stride2/contiguous/strips
  TEXT "shuffle(sums[1], (2 * lane + 1) % kWarp)" BECOMES "shuffle(sums[1], (2 * lane + 2) % kWarp)"
  EXPECT "wrong result")

snv2_add_mutant(spread_with_the_halves_swapped
  FILE cuda/alternate.h OF cuda/cat_shuffle.cu IN kernels CASES cat_shuffle/contiguous/plane
  TEXT "which == 0 ? params.a : params.b" BECOMES "which == 1 ? params.a : params.b"
  EXPECT "wrong result")

snv2_add_mutant(columns_with_too_small_a_margin
  FILE cuda/columns.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/tiles
  TEXT "for (int i = thread; i <= width; i += kColumnThreads)"
  BECOMES "for (int i = thread; i < width - 1; i += kColumnThreads)"
  EXPECT "shared memory" "nobody wrote" "columns.h")

snv2_add_mutant(columns_with_a_row_above_the_plane
  FILE cuda/columns.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/tiles
  TEXT "params.strips > 1, row > 0," BECOMES "params.strips > 1, true,"
  EXPECT "wrong result")

snv2_add_mutant(columns_past_the_last_plane
  FILE cuda/columns.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous/tiles
  TEXT "left_over < params.tile ? left_over : params.tile" BECOMES "params.tile"
  EXPECT "global" "outside all buffers" "span.h")

snv2_add_mutant(spans_without_phase
  FILE cuda/span.h OF cuda/split_dw_cat_shuffle.cu IN kernels CASES split_dw_cat_shuffle
  TEXT "const int phase = misalignment(from, 16);" BECOMES "const int phase = 0;"
  EXPECT "is not aligned" "span.h")

snv2_add_mutant(parameters_past_the_end
  FILE cuda/span.h OF cuda/dw_conv3x3.cu IN kernels CASES dw_conv3x3/contiguous
  TEXT [[i < count; i += kTeam) {
    store(to + i, load(Global<const float>]]
  BECOMES [[i <= count; i += kTeam) {
    store(to + i, load(Global<const float>]]
  EXPECT "span.h")

snv2_add_mutant(march_with_the_next_channel
  FILE cuda/pixel_march.h OF cuda/split_dw_cat_shuffle.cu IN kernels CASES split_dw_cat_shuffle/channels_last
  TEXT "main_(channel + (kPassthrough ?" BECOMES "main_(channel - 1 + (kPassthrough ?"
  EXPECT "wrong result")

# Gradients ------------------------------------------------------------------------------------

snv2_add_mutant(gradients_without_barrier_before_they_turn_round RACE
  FILE cuda/depthwise_backward.h OF cuda/depthwise_backward.cu IN kernels CASES dw_conv3x3_backward/contiguous/plane
  TEXT [[    sync_threads();
  }
  if (idle) return;
]] BECOMES [[  }
  if (idle) return;
]]
  EXPECT "shared memory: race" "backward_march.h")

snv2_add_mutant(gradients_without_the_last_row
  FILE cuda/backward_march.h OF cuda/depthwise_backward.cu IN kernels CASES dw_conv3x3_backward/contiguous/tiles
  TEXT "if (has_below) add(below, std::integral_constant<int, 2>{});"
  BECOMES "if (y + 2 < height) add(below, std::integral_constant<int, 2>{});"
  EXPECT "wrong result: grad_weight")

snv2_add_mutant(gradients_that_stay_in_a_row
  FILE cuda/backward_block.h OF cuda/depthwise_backward.cu IN kernels CASES dw_conv3x3_backward/channels_last/blocks
  TEXT "source + (column < across ? step : step + wrap);" BECOMES "source + (step + 0 * wrap);"
  EXPECT "wrong result")

snv2_add_mutant(gather_without_barrier RACE
  FILE cuda/alternate.h OF cuda/cat_shuffle_backward.cu IN kernels CASES cat_shuffle_backward/contiguous
  TEXT [[  sync_warp();

  // Store.
]] BECOMES [[  // Store.
]]
  EXPECT "shared memory")

# Indices of 32 bits, in maps of more than 2^31 elements ---------------------------------------

snv2_add_mutant(planes_of_32_bits TYPE half_t
  FILE cuda/planes.h OF cuda/split_dw_cat_shuffle.cu IN kernels CASES split_dw_cat_shuffle/contiguous/large
  TEXT "Global<T>{op.out} + (image * op.out_image + q * out_plane + row0 * op.out_width);"
  BECOMES
    "Global<T>{op.out} + static_cast<int>(image * op.out_image + q * out_plane + row0 * op.out_width);"
  EXPECT "global store" "outside all buffers")

snv2_add_mutant(strips_of_32_bits TYPE half_t
  FILE cuda/pixels.h OF cuda/split_dw_cat_shuffle.cu IN kernels CASES channels_last/large_strips
  TEXT "Global<T>{op.out} + image * op.out_image;"
  BECOMES "Global<T>{op.out} + static_cast<int>(image * op.out_image);"
  EXPECT "global store" "outside all buffers")

snv2_add_mutant(zip_of_32_bits
  FILE cuda/cat_shuffle.h OF cuda/cat_shuffle.cu IN kernels CASES channels_last/large
  TEXT "Global<T>{params.out} + 2 * at;" BECOMES "Global<T>{params.out} + static_cast<int>(2 * at);"
  EXPECT "global store" "outside all buffers")

snv2_add_mutant(columns_of_32_bits TYPE half_t
  FILE cuda/columns.h OF cuda/split_dw_cat_shuffle.cu IN kernels CASES split_dw_cat_shuffle/contiguous/large
  TEXT "Global<T>{op.out} + (image * op.out_image + kUnit * from);"
  BECOMES "Global<T>{op.out} + static_cast<int>(image * op.out_image + kUnit * from);"
  EXPECT "global store" "outside all buffers")

snv2_add_mutant(direct_of_32_bits TYPE half_t
  FILE cuda/span.h OF cuda/split_dw_cat_shuffle.cu IN kernels CASES contiguous/large_direct
  TEXT "store(Global<T>{op.out} + o, value);"
  BECOMES "store(Global<T>{op.out} + static_cast<int>(o), value);"
  EXPECT "global store" "outside all buffers")

# Units --------------------------------------------------------------------------------------

snv2_add_mutant(unit_without_wait
  FILE cuda/unit.h OF cuda/unit.cu IN gpu_units CASES stages_with_resident
  TEXT [[      cp_async_wait<0>();
      sync_threads();
    }
]] BECOMES [[      sync_threads();
    }
]]
  EXPECT "read at unit_product.h" "cp_async_wait, or a barrier after it, is missing")

snv2_add_mutant(unit_without_barrier_after_load RACE
  FILE cuda/unit.h OF cuda/unit.cu IN gpu_units CASES stages_with_resident
  TEXT [[      cp_async_wait<0>();
      sync_threads();
    }
]] BECOMES [[      cp_async_wait<0>();
    }
]]
  EXPECT "shared memory: race: read at unit_product.h" "written by" "unit_load.h")

snv2_add_mutant(unit_without_barrier_after_the_first_product RACE
  FILE cuda/unit.h OF cuda/unit.cu IN gpu_units CASES stages_with_resident
  TEXT [[      sync_threads();
      if (more) {
]] BECOMES [[      if (more) {
]]
  EXPECT "shared memory: race: write at unit_tensor.h" "read by" "mma_float.h")

snv2_add_mutant(unit_without_barrier_before_the_second_product RACE
  FILE cuda/unit.h OF cuda/unit.cu IN gpu_units CASES stages_with_resident
  TEXT [[      } else {
        sync_threads();
      }

      // Second product.
]] BECOMES [[      }
]]
  EXPECT "shared memory: race: read at mma_float.h" "written by" "unit_convolve.h")

snv2_add_mutant(cluster_without_barrier_before_it_hands_out RACE
  FILE cuda/unit.h OF cuda/unit.cu IN gpu_units CASES stages_with_clustered
  TEXT [[        // All are past their first product and the second one before it.
        sync_cluster_reads();
]] BECOMES [[        // All are past their first product and the second one before it.
]]
  EXPECT "shared memory: read at unit_load.h" "nobody wrote")

snv2_add_mutant(cluster_without_barrier_after_it_has_handed_out RACE
  FILE cuda/unit.h OF cuda/unit.cu IN gpu_units CASES stages_with_clustered
  TEXT [[        sync_cluster();
      } else {
        sync_threads();
      }
]] BECOMES [[      } else {
        sync_threads();
      }
]]
  EXPECT "shared memory: read at mma_float.h" "nobody wrote")

snv2_add_mutant(unit_that_does_not_wait_for_its_table
  FILE cuda/unit.h OF cuda/unit.cu IN gpu_units CASES stages_with_resident
  TEXT "cp_async_wait<1>();" BECOMES ""
  EXPECT "read at unit_load.h" "cp_async_wait, or a barrier after it, is missing")

snv2_add_mutant(unit_that_does_not_wait_for_its_input
  FILE cuda/unit.h OF cuda/unit.cu IN gpu_units CASES stages_with_resident
  TEXT [[  grid_dependency_wait();
]] BECOMES " "
  EXPECT "global load" "before grid_dependency_wait")

snv2_add_mutant(unit_without_upper_halo TYPE half_t
  FILE cuda/unit_params.h OF cuda/unit.cu IN gpu_units CASES ranges_match
  TEXT "kStride - reach;" BECOMES "kStride;"
  EXPECT "shared memory: read at unit_convolve.h" "nobody wrote")

snv2_add_mutant(unit_past_the_ring
  FILE cuda/unit_product.h OF cuda/unit.cu IN gpu_units CASES stages_with_direct
  TEXT "line + (there < ring ? there : there - ring)"
  BECOMES "line + (there <= ring ? there : there - ring)"
  EXPECT "is off by")

snv2_add_mutant(unit_with_the_next_tap
  FILE cuda/unit_convolve.h OF cuda/unit.cu IN gpu_units CASES stages_with_resident
  TEXT "taps_[kRow * 3 + tap]" BECOMES "taps_[tap * 3 + kRow]"
  EXPECT "is off by")

snv2_add_mutant(unit_that_convolves_padding
  FILE cuda/unit_convolve.h OF cuda/unit.cu IN gpu_units CASES stages_with_resident
  TEXT "ring.width - (at + w * kOfWord)" BECOMES "ring.row - (at + w * kOfWord)"
  EXPECT "is off by")

snv2_add_mutant(unit_that_asks_for_its_warp_with_some_lanes
  FILE cuda/unit_tensor.h OF cuda/unit.cu IN gpu_units CASES stages_with_resident
  TEXT "for (int p = warp * kPair; p < end;" BECOMES "for (int p = warp_of_cta() * kPair; p < end;"
  EXPECT "waits in shuffle at mma.h")

snv2_add_mutant(unit_whose_ctas_all_store_what_passes RACE
  FILE cuda/unit_tensor.h OF cuda/unit.cu IN gpu_units CASES stages_with_clustered
  TEXT "other >= 0 ? computed(other)" BECOMES "other >= 0 ? true"
  EXPECT "global" "race")

# Any activations and windows ----------------------------------------------------------------

snv2_add_mutant(any_unit_with_a_short_ring TYPE half_t
  FILE cuda/unit_cut.h OF cuda/unit_any.cu IN gpu_units CASES any_windows
  TEXT "(stretch_rows(s, c.columns) + std::min(2 * s.reach," BECOMES "(stretch_rows(s, c.columns) + std::min(2 * s.reach - 1,"
  EXPECT "is off by")

snv2_add_mutant(any_unit_that_forgets_dilation TYPE any
  FILE cuda/unit_convolve.h OF cuda/unit_any.cu IN gpu_units CASES any_windows
  TEXT "kStride + (kx - half) * dilation_" BECOMES "kStride + (kx - half)"
  EXPECT "is off by")

snv2_add_mutant(any_unit_with_the_next_slope TYPE any
  FILE cuda/activation.h OF cuda/unit_any.cu IN gpu_units CASES any_activations
  TEXT "after.slopes} + row" BECOMES "after.slopes} + (row ^ 1)"
  EXPECT "is off by")

# Pieces of units, gates, copies --------------------------------------------------------------

snv2_add_mutant(piece_of_the_next_column
  FILE cuda/unit_convolve.h OF cuda/unit_piece.cu IN gpu_pieces CASES pieces_match
  TEXT "values[p * kStride % kPixels]" BECOMES "values[(p * kStride + 1) % kPixels]"
  EXPECT "is off by")

snv2_add_mutant(piece_that_stores_the_rows_of_another_cta
  FILE cuda/unit_product.h OF cuda/unit_piece.cu IN gpu_pieces CASES pieces_match
  TEXT "from = m.dw + (branch.first_depth + row) * m.dw_pitch;"
  BECOMES "from = m.dw + row * m.dw_pitch;"
  EXPECT "shared memory: read at unit_product.h" "nobody wrote")

snv2_add_mutant(piece_without_barrier_before_it_stores RACE
  FILE cuda/unit.h OF cuda/unit_piece.cu IN gpu_pieces CASES pieces_match
  TEXT [[      } else {
        sync_threads();
      }

      // Second product.
]] BECOMES [[      }

      // Second product.
]]
  EXPECT "shared memory: race: read at unit_product.h" "written by" "unit_convolve.h")

snv2_add_mutant(gate_without_barrier_after_the_means RACE
  FILE cuda/gate.cu OF cuda/gate.cu IN gpu_pieces CASES gates_match
  TEXT [[(1.0f / params.pixels));
  }
  sync_threads();
]] BECOMES [[(1.0f / params.pixels));
  }
]]
  EXPECT "shared memory: race: read at gate.cu" "written by")

snv2_add_mutant(gate_without_barrier_after_it_has_handed_out RACE
  FILE cuda/gate.cu OF cuda/gate.cu IN gpu_pieces CASES gates_match
  TEXT [[    sync_cluster();
]] BECOMES " "
  EXPECT "shared memory: read at gate.cu" "nobody wrote")

snv2_add_mutant(gate_that_does_not_wait_for_its_input
  FILE cuda/gate.cu OF cuda/gate.cu IN gpu_pieces CASES gates_match
  TEXT [[  grid_dependency_wait();
]] BECOMES " "
  EXPECT "global" "before grid_dependency_wait")

snv2_add_mutant(gate_with_the_columns_of_another_cta
  FILE cuda/gate.cu OF cuda/gate.cu IN gpu_pieces CASES gates_match
  TEXT "(int64_t{tile} * deep + first)" BECOMES "(int64_t{tile} * deep)"
  EXPECT "is off by")

snv2_add_mutant(gate_with_a_part_of_the_sums
  FILE cuda/gate.cu OF cuda/gate.cu IN gpu_pieces CASES gates_match
  TEXT "for (int other = 0; other < ranks; ++other) sum +="
  BECOMES "for (int other = 0; other < ranks - 1; ++other) sum +="
  EXPECT "is off by")

snv2_add_mutant(gate_past_the_last_channel
  FILE cuda/gate.cu OF cuda/gate.cu IN gpu_pieces CASES gates_match
  TEXT "c < end && c < channels; c += kGateWarps" BECOMES "c < end; c += kGateWarps"
  EXPECT "gate.cu")

snv2_add_mutant(shortcut_from_the_planes_it_is_added_to
  FILE cuda/gate.cu OF cuda/gate.cu IN gpu_pieces CASES shortcuts_match
  TEXT "share.line(params.at.sources, c)" BECOMES "share.line(params.at.table, c)"
  EXPECT "is off by")

snv2_add_mutant(shortcut_without_layers_that_does_not_wait
  FILE cuda/gate.cu OF cuda/gate.cu IN gpu_pieces CASES shortcuts_match
  TEXT "  grid_dependency_wait();" BECOMES "  if (params.reduced > 0) grid_dependency_wait();"
  EXPECT "global" "before grid_dependency_wait")

snv2_add_mutant(copy_that_stays_in_its_image
  FILE cuda/copy.cu OF cuda/copy.cu IN gpu_pieces CASES pieces_match
  TEXT "image = y / params.height;" BECOMES "image = row0 / params.height;"
  EXPECT "copy.cu")

# Ends of networks ---------------------------------------------------------------------------

snv2_add_mutant(stem_without_barrier_before_store RACE
  FILE cuda/stem.h OF cuda/stem.cu IN gpu_ends CASES stem_of_three
  TEXT [[  sync_threads();

  // Store.
]] BECOMES [[  // Store.
]]
  EXPECT "shared memory: race: read at line.h" "written by" "stem.h")

snv2_add_mutant(stem_below_the_last_row
  FILE cuda/stem.h OF cuda/stem.cu IN gpu_ends CASES stem_of
  TEXT "row >= 0 && row < height;" BECOMES "row >= 0 && row <= height;"
  EXPECT "global" "outside all buffers")

snv2_add_mutant(head_that_waits_for_too_few
  FILE cuda/head.h OF cuda/head.cu IN gpu_ends CASES head_matches
  TEXT [[    cp_async_wait<1>();
    sync_threads();

    // Multiply.
    if (first == 0) {
]] BECOMES [[    cp_async_wait<2>();
    sync_threads();

    // Multiply.
    if (first == 0) {
]]
  EXPECT "cp_async_wait is missing")

snv2_add_mutant(head_that_averages_padding
  FILE cuda/head.h OF cuda/head.cu IN gpu_ends CASES head_matches
  TEXT "2 * t + c < columns" BECOMES "2 * t + c < kBlock"
  EXPECT "not")

snv2_add_mutant(head_without_barrier_after_a_stage RACE
  FILE cuda/head.h OF cuda/head.cu IN gpu_ends CASES head_matches
  TEXT [[    sync_threads();
    first = next_first, column0 = next_column0;
]] BECOMES [[    first = next_first, column0 = next_column0;
]]
  EXPECT "read at mma_float.h" "cp_async_wait, or a barrier after it, is missing")

snv2_add_mutant(linear_without_barrier_between_parts RACE
  FILE cuda/head.h OF cuda/head.cu IN gpu_ends CASES linear_layer
  TEXT [[  sync_threads();
  for (int o = ]] BECOMES [[  for (int o = ]]
  EXPECT "shared memory: read at head.h" "nobody wrote")

include(${CMAKE_CURRENT_LIST_DIR}/mutants_stages.cmake)
