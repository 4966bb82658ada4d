// The threads of the CPU backend: who runs what, who waits for whom, and how they end.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/cores.h"
#include "cpu/pool.h"
#include "cpu/team.h"
#include "snv2/pool.h"

namespace {

using snv2::ParallelFor;
using snv2::cpu::Affinity;
using snv2::cpu::Pool;
using snv2::cpu::Team;
using snv2::cpu::TeamCounter;

ParallelFor parallel_for(Pool& pool, int64_t threads) {
  return {threads,
          [](void* context, int64_t count, ParallelFor::Body body, void* arg) {
            static_cast<Pool*>(context)->run(count, body, arg);
          },
          &pool};
}

// How often each body of some calls has run.
class Counts {
 public:
  explicit Counts(int64_t bodies) : counts_(static_cast<size_t>(bodies)) {}
  void add(int64_t i) { counts_[static_cast<size_t>(i)].fetch_add(1); }
  bool are(int expected) const {
    for (const std::atomic<int>& count : counts_) {
      if (count.load() != expected) return false;
    }
    return true;
  }

 private:
  std::vector<std::atomic<int>> counts_;
};

void sleep_for(int microseconds) {
  std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

// A body may wait for another's beginning where helpers are there; returns whether it came.
bool comes(const std::atomic<int>& value, int expected) {
  for (int i = 0; i < 10'000; ++i) {
    if (value.load() >= expected) return true;
    sleep_for(1000);
  }
  return false;
}

// Runs f in a child, which must end by itself; returns its exit status, -1 if a signal ended it.
template <class F>
int in_child(const F& f) {
  std::fflush(stdout);  // or the child prints it again
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    f();
    _exit(failures().empty() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

#if defined(__linux__)
// Binds this thread to the first or the last processor of a set, in turn; returns which.
int bind_to_some_core(bool last) {
  cpu_set_t set, one;
  sched_getaffinity(getpid(), sizeof set, &set);
  int core = -1;
  for (int i = 0; i < CPU_SETSIZE && (last || core < 0); ++i) {
    if (CPU_ISSET(i, &set)) core = i;
  }
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
  return core;
}
#endif

TEST(each_body_runs_once) {
  Pool pool(3);
  for (const int64_t count : {0, 1, 2, 3, 4, 50}) {
    Counts counts(count);
    for (int round = 1; round <= 200; ++round) {
      parallel_for(pool, count)(count, [&](int64_t i) { counts.add(i); });
      CHECK(counts.are(round), "%d bodies, round %d", int(count), round);
    }
  }
}

TEST(bodies_run_at_the_same_time) {
  Pool pool(3);
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> begun{0}, together{0};
    parallel_for(pool, 3)(3, [&](int64_t) {
      ++begun;
      if (comes(begun, 3)) ++together;
    });
    CHECK(together == 3);
    if (round % 4 == 0) sleep_for(1000);  // workers fall asleep
  }
  CHECK(pool.workers() == 2);
}

#if defined(__linux__) && !defined(SNV2_RUN_BY_EMULATOR)

// Else both would wait for each other on one processor, with others idle.
TEST(workers_keep_off_the_processor_of_their_caller) {
  const Affinity all = Affinity::of_this_thread();
  if (all.cores() < 2) return;
  std::thread([&] {
    Pool pool(2, all);
    for (int round = 0; round < 12; ++round) {
      const int core = bind_to_some_core(round % 2 != 0);
      if (round % 2 == 0) sleep_for(1000);  // the worker falls asleep, where the caller is next
      std::atomic<int> begun{0};
      parallel_for(pool, 2)(2, [&](int64_t i) {
        ++begun;
        comes(begun, 2);
        const int here = snv2::cpu::current_core();
        CHECK((here == core) == (i == 0), "body %d on %d, the caller on %d", int(i), here, core);
      });
    }
  }).join();
}

// A caller that sleeps leaves its processor to its helper, which may have none to itself.
TEST(callers_lend_their_processor_while_they_sleep) {
  const Affinity all = Affinity::of_this_thread();
  if (all.cores() < 2) return;
  const auto bound_to_all = [&] { return Affinity::of_this_thread() == all; };
  const auto comes_about = [&] {
    for (int i = 0; i < 10'000 && !bound_to_all(); ++i) sleep_for(1000);
    return bound_to_all();
  };
  Pool pool(2, all);
  std::vector<TeamCounter> counters(static_cast<size_t>(snv2::cpu::team_counters(2)));
  for (int round = 0; round < 4; ++round) {
    std::atomic<int> begun{0}, inside{0};
    parallel_for(pool, 2)(2, [&](int64_t i) {
      ++begun;
      comes(begun, 2);
      if (i == 1) CHECK(comes_about(), "at the end of the bodies");
    });
    for (TeamCounter& each : counters) each.value = 0;
    parallel_for(pool, 2)(2, [&](int64_t i) {
      Team team(counters.data(), 2, i);
      ++begun;
      comes(begun, 4);
      const bool helper = i == 1;
      team(2, [&](int64_t) {
        ++inside;
        comes(inside, 2);
        if (helper) CHECK(comes_about(), "at the end of a step");
      });
      ++begun;
      comes(begun, 6);
      if (helper) {
        CHECK(!bound_to_all(), "a caller that has woken takes its processor back");
        ++begun;
      }
      comes(begun, 7);  // or the caller waits for the body, and lends it again
    });
  }
}

#endif

// The last are handed to nobody, and run all the same.
TEST(no_more_workers_than_cores) {
  Pool pool(2), alone(1);
  Counts counts(64);
  for (Pool* const each : {&pool, &alone}) {
    parallel_for(*each, 64)(64, [&](int64_t i) { counts.add(i); });
  }
  CHECK(counts.are(2));
  CHECK(pool.workers() == 1 && alone.workers() == 0);
}

TEST(callers_that_find_no_worker_run_alone) {
  Pool pool(2);
  std::atomic<int> inside{0}, ended{0};
  std::thread other([&] {
    parallel_for(pool, 2)(2, [&](int64_t) {
      ++inside;
      comes(ended, 1);
    });
  });
  CHECK(comes(inside, 2));
  const auto self = std::this_thread::get_id();
  parallel_for(pool, 2)(2, [&](int64_t) { CHECK(std::this_thread::get_id() == self); });
  ended = 1;
  other.join();
}

TEST(many_callers_at_once) {
  Pool pool(4);
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 6; ++caller) {
    callers.emplace_back([&, caller] {
      Counts counts(4);
      for (int round = 1; round <= 300; ++round) {
        parallel_for(pool, 4)(4, [&](int64_t i) { counts.add(i); });
        if (!counts.are(round)) ++wrong;
        if (round % 100 == caller) sleep_for(500);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0 && pool.workers() <= 3);
}

TEST(a_body_that_calls_runs_alone) {
  Pool pool(3);
  std::atomic<int> inner{0};
  parallel_for(pool, 3)(3, [&](int64_t) {
    const auto self = std::this_thread::get_id();
    parallel_for(pool, 2)(2, [&](int64_t) {
      if (std::this_thread::get_id() == self) ++inner;
    });
  });
  CHECK(inner == 6);
}

TEST(what_a_body_throws_reaches_the_caller) {
  Pool pool(3);
  for (const int64_t thrower : {0, 1, 2, 7}) {
    std::atomic<int> begun{0};
    std::string caught;
    try {
      parallel_for(pool, 8)(8, [&](int64_t i) {
        ++begun;
        if (i < 3) comes(begun, 3);  // in three threads
        if (i == thrower) throw std::runtime_error("body " + std::to_string(i));
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    CHECK(caught == "body " + std::to_string(thrower), "%s", caught.c_str());
    Counts counts(3);
    parallel_for(pool, 3)(3, [&](int64_t i) { counts.add(i); });
    CHECK(counts.are(1));
  }
}

TEST(a_stopped_pool_runs_alone) {
  Pool pool(3);
  Counts counts(3);
  const auto call = [&] { parallel_for(pool, 3)(3, [&](int64_t i) { counts.add(i); }); };
  call();
  pool.stop();
  call();
  pool.stop();
  CHECK(counts.are(2));
}

// Each step reads what the one before has written in other members' parts. In some, parts take so
// long that those who wait for them fall asleep.
TEST(a_team_takes_steps_together) {
  Pool pool(4);
  for (const int64_t threads : {2, 3, 4, 7}) {
    std::vector<TeamCounter> counters(snv2::cpu::team_counters(threads));
    std::vector<int64_t> values(static_cast<size_t>(threads), 1), next = values;
    std::atomic<int64_t> wrong{0};
    constexpr int64_t kSteps = 200;
    parallel_for(pool, threads)(threads, [&](int64_t member) {
      Team team(counters.data(), threads, member);
      for (int64_t step = 0; step < kSteps; ++step) {
        auto& from = step % 2 == 0 ? values : next;
        auto& to = step % 2 == 0 ? next : values;
        team(threads, [&](int64_t i) {
          if (step % 40 == 7 && i == step % threads) sleep_for(400);
          const int64_t left = from[static_cast<size_t>((i + 1) % threads)];
          if (left != step + 1) ++wrong;
          to[static_cast<size_t>(i)] = left + 1;
        });
      }
    });
    CHECK(wrong == 0 && values == std::vector<int64_t>(values.size(), kSteps + 1));
  }
}

TEST(a_part_that_throws_leaves_no_member_waiting) {
  Pool pool(3);
  std::vector<TeamCounter> counters(snv2::cpu::team_counters(3));
  CHECK_THROWS(parallel_for(pool, 3)(3, [&](int64_t member) {
    Team team(counters.data(), 3, member);
    for (int step = 0; step < 20; ++step) {
      team(3, [&](int64_t i) {
        if (step == 5 && i == 1) throw std::runtime_error("part");
      });
    }
  }));
}

TEST(threads_that_cannot_be_started_are_done_without) {
  const int status = in_child([] {
    if (geteuid() == 0 && setuid(65534) != 0) _exit(2);
    const rlimit none{0, 0};
    if (setrlimit(RLIMIT_NPROC, &none) != 0) _exit(3);
    Pool pool(3);
    Counts counts(3);
    parallel_for(pool, 3)(3, [&](int64_t i) { counts.add(i); });
    _exit(counts.are(1) && pool.workers() == 0 ? 0 : 4);
  });
  CHECK(status == 0, "%d", status);
}

// Neither ThreadSanitizer nor QEMU's user mode, which aborts, lets a child of several threads start
// any.
#if !defined(__SANITIZE_THREAD__) && !defined(SNV2_RUN_BY_EMULATOR)

void call_shared_pool() {
  Counts counts(2);
  snv2::shared_pool(2)(2, [&](int64_t i) { counts.add(i); });
  CHECK(counts.are(1));
}

TEST(a_forked_child_starts_its_own_threads) {
  call_shared_pool();
  CHECK(in_child(call_shared_pool) == 0);
  // While another thread calls
  std::atomic<bool> ends{false};
  std::thread other([&] {
    while (!ends) call_shared_pool();
  });
  for (int i = 0; i < 10; ++i) CHECK(in_child(call_shared_pool) == 0);
  ends = true;
  other.join();
  call_shared_pool();
}

TEST(a_process_ends_with_its_threads) {
  CHECK(in_child([] {
          call_shared_pool();
          std::exit(7);
        }) == 7);
  CHECK(in_child([] {
          std::thread([] {
            for (;;) call_shared_pool();
          }).detach();
          sleep_for(1000);
          std::exit(8);
        }) == 8);
  for (const int64_t which : {0, 1}) {
    CHECK(in_child([&] {
            snv2::shared_pool(2)(2, [&](int64_t i) {
              if (i == which) std::exit(9);
              sleep_for(1000);
            });
          }) == 9);
  }
}

#endif

TEST(cores_that_a_cgroup_has_time_for) {
  namespace fs = std::filesystem;
  const fs::path root = fs::temp_directory_path() / ("snv2_pool_" + std::to_string(getpid()));
  const auto write = [&](const std::string& path, const std::string& text) {
    fs::create_directories((root / path).parent_path());
    std::ofstream(root / path) << text;
  };
  const auto cores = [&](const std::string& groups) {
    return snv2::cpu::cgroup_cores(groups, root.string());
  };
  constexpr int64_t kAll = INT64_MAX;
  CHECK(cores("") == kAll && cores("no group at all\n") == kAll && cores("0::/gone\n") == kAll);
  write("two/cpu.max", "150000 100000\n");
  write("two/inner/cpu.max", "max 100000\n");
  write("tiny/cpu.max", "1000 100000\n");
  CHECK(cores("0::/two\n") == 2 && cores("0::/two/inner/deeper\n") == 2);
  CHECK(cores("0::/tiny\n") == 1);
  write("cpu,cpuacct/one/cpu.cfs_quota_us", "300000\n");
  write("cpu,cpuacct/one/cpu.cfs_period_us", "100000\n");
  write("cpu/cpu.cfs_quota_us", "-1\n");
  write("cpu/cpu.cfs_period_us", "100000\n");
  CHECK(cores("4:memory:/one\n3:cpu,cpuacct:/one\n0::/\n") == 3);
  CHECK(cores("1:cpu:/one\n") == kAll && cores("7:cpuset:/one\n") == kAll);
  fs::remove_all(root);
}

TEST(usable_cores_are_those_that_the_thread_is_bound_to) {
  const int64_t before = snv2::usable_cores();
  CHECK(before >= 1 && before <= std::thread::hardware_concurrency());
#if defined(__linux__)
  std::thread([] {
    cpu_set_t all, one;
    sched_getaffinity(0, sizeof all, &all);
    CPU_ZERO(&one);
    for (int cpu = 0; CPU_COUNT(&one) == 0; ++cpu) {
      if (CPU_ISSET(cpu, &all)) CPU_SET(cpu, &one);
    }
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    CHECK(snv2::usable_cores() == 1);
    const auto self = std::this_thread::get_id();
    snv2::shared_pool(4)(4, [&](int64_t) { CHECK(std::this_thread::get_id() == self); });
  }).join();
#endif
  CHECK(snv2::usable_cores() == before);
}

}  // namespace

int main() { return run_all_tests(); }
