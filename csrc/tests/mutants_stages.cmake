# Mutants of the kernel that takes stages of units in one launch; see mutants.cmake.

snv2_add_mutant(stages_without_wait_for_rows TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT [[  barriers.wait_for_rows(number);
]] BECOMES ""
  EXPECT "read at unit_convolve.h" "store_async" "barrier_wait for its phase")

snv2_add_mutant(stages_with_rows_one_too_high TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT "rank > 0 ? (1 + map.rows) * map.row : -1)"
  BECOMES "rank > 0 ? map.rows * map.row : -1)"
  EXPECT "write at stages.h" "under way")

snv2_add_mutant(stages_without_word_upwards TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT "if (unit.stride == 2 && above && threadIdx.x == 0) {"
  BECOMES "if (unit.stride == 2 && above && threadIdx.x == 0 && number < 0) {"
  EXPECT "waits in barrier_wait" "4 bytes are missing")

snv2_add_mutant(stages_with_one_place_for_words TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES single_units
  TEXT " + (number & 1), rows_barrier"
  BECOMES ", rows_barrier"
  EXPECT "under way")

snv2_add_mutant(stages_with_one_barrier_of_rows TYPE half_t
  FILE cuda/stages_load.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT "return first_ + (unit & 1); }"
  BECOMES "return first_; }"
  EXPECT "read at unit_convolve.h" "under way")

snv2_add_mutant(stages_without_zero_tail TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT [[    zero_tail(unit.dw.out_at, unit.mid);
]] BECOMES ""
  EXPECT "nobody wrote")

snv2_add_mutant(stages_without_row_handed_down TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_three_stages
  TEXT "if (unit.stride == 2 && number > 0 && below) {"
  BECOMES "if (unit.stride == 2 && number > 99 && below) {"
  EXPECT "waits in barrier_wait" "bytes are missing")

snv2_add_mutant(stages_that_release_a_quad_too_early TYPE half_t
  FILE cuda/stages_weights.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT [[    sync_warp();
    refill();
    if (quads > 1)]] BECOMES [[    refill();
    if (quads > 1)]]
  EXPECT "write at stages_weights.h" "read by" "mma.h")

snv2_add_mutant(stages_with_a_quad_too_short TYPE half_t
  FILE cuda/stages_weights.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_depths
  TEXT "left_ < kQuadTiles ? left_ : kQuadTiles;"
  BECOMES "left_ < kQuadTiles ? left_ : kQuadTiles - 1;"
  EXPECT "read at mma.h" "nobody wrote")

snv2_add_mutant(stages_that_hold_two_quads_of_many TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_depths
  TEXT "m.deep > kRingTiles ? 1 : m.deep > kQuadTiles ? 2 : 1;"
  BECOMES "m.deep > kQuadTiles ? 2 : 1;"
  EXPECT "barrier_expect" "once more than the 1 arrivals")

snv2_add_mutant(stages_without_cluster_barrier_before_the_result TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT [[  sync_cluster();  // the others have no use for what lies there
]] BECOMES ""
  EXPECT "race: write at stages.h" "read by" "unit_convolve.h")

snv2_add_mutant(stages_without_wait_for_parameters TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT [[  barriers.wait_for_parameters(number);
]] BECOMES ""
  EXPECT "under way")

snv2_add_mutant(stages_without_wait_for_tables TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT [[  cp_async_wait<0>();  // the next unit's tables
]] BECOMES ""
  EXPECT "cp_async_wait")

snv2_add_mutant(stages_that_fill_tables_with_the_first_plane TYPE half_t
  FILE cuda/stages_load.h OF cuda/stages.cu IN gpu_stage_clusters CASES infinity_beside
  TEXT [[params.maps[unit.in].planes);
      return;]] BECOMES [[0);
      return;]]
  EXPECT "is off by nan of inf")

snv2_add_mutant(stages_without_barrier_before_the_second_product RACE TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT [[  sync_threads();

  // 3.]] BECOMES [[

  // 3.]]
  EXPECT "read at stages_weights.h" "nobody wrote")

snv2_add_mutant(stages_with_mid_too_late TYPE half_t
  FILE cuda/stages_cut.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_three_stages
  TEXT "i == 0 ? 0 : phase(i - 1, 0), phase(i, 1));"
  BECOMES "phase(i, 0), phase(i, 1));"
  EXPECT "race: write at stages.h" "written by")

snv2_add_mutant(stages_without_cluster_barrier_at_the_start TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT "  sync_cluster();  // the others have begun"
  BECOMES "  sync_threads();  // the others have begun"
  EXPECT "may not have begun")

snv2_add_mutant(stages_with_a_plane_of_the_next_owner TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT "static_cast<int>((static_cast<float>(n) + 0.5f) * by_share);"
  BECOMES "static_cast<int>((static_cast<float>(n) + 1.5f) * by_share);"
  EXPECT "remote at stages.h" "outside the cluster")

snv2_add_mutant(stages_that_write_a_share_from_the_second_plane_on TYPE half_t
  FILE cuda/stages.h OF cuda/stages.cu IN gpu_stage_clusters CASES of_all_sizes
  TEXT "first = rank * params.result_share, left"
  BECOMES "first = rank * params.result_share + 1, left"
  EXPECT "is off by nan")

snv2_add_mutant(cut_with_a_map_too_late TYPE any
  FILE cuda/stages_cut.h OF tests/test_gpu_stage_cuts.cpp IN gpu_stage_clusters CASES cuts_of
  TEXT "phase(born, until - born > 1 ? 2 : 0)"
  BECOMES "phase(born, 2)"
  EXPECT "the map of unit" "overlap")

snv2_add_mutant(regions_in_one_order TYPE any
  FILE cuda/stages_cut.h OF tests/test_gpu_stage_cuts.cpp IN gpu_stage_clusters CASES regions_that
  TEXT [[      std::rotate(wanted_.begin(), last, last + 1);
]] BECOMES ""
  EXPECT "better")
