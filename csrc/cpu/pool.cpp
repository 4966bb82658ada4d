#include "cpu/pool.h"

#include <algorithm>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#endif

namespace snv2::cpu {
namespace {

// Workers wait awake for the next call of a loop, and callers for the ends of bodies.
constexpr std::chrono::microseconds kNextCall{200}, kLastBody{100};

thread_local bool in_body = false;

struct InBody {
  InBody() { in_body = true; }
  ~InBody() { in_body = false; }
};

// Signals are for the threads of the application, which expects no others.
class SignalsBlocked {
#if defined(__unix__) || defined(__APPLE__)
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
#endif
};

// Names a thread from without, so that one that has not run yet has its name already.
void name_thread([[maybe_unused]] std::thread& thread) {
#if defined(__linux__)
  pthread_setname_np(thread.native_handle(), "snv2");
#endif
}

}  // namespace

// One call, on the caller's stack.
struct Pool::Job {
  static constexpr uint32_t kAsleep = 1, kWorker = 2;

  const Pool& pool;
  const ParallelFor::Body body;
  void* const arg;
  const int64_t count;
  // The first body that was handed to nobody; none before all is handed out.
  std::atomic<int64_t> next{count};
  // kWorker for each worker that it was handed to and that has not left, kAsleep if the caller is.
  Word helpers{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error = nullptr;  // of the body that failed first

  std::atomic<int> core{current_core()};  // the caller's

  Job(const Pool& p, ParallelFor::Body b, void* a, int64_t n)
      : pool(p), body(b), arg(a), count(n) {}

  void run(int64_t i) {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      body(arg, i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }

  // The body and then those that were handed to nobody.
  void run_from(int64_t i) {
    for (; i < count; i = next.fetch_add(1)) run(i);
  }

  // A worker touches the job for the last time.
  void leave() {
    if (helpers.fetch_sub(kWorker, std::memory_order_acq_rel) == (kWorker | kAsleep)) {
      wake_one(helpers);
    }
  }

  void wait() {
    Spin spin(kLastBody);
    uint32_t seen = helpers.load(std::memory_order_acquire);
    while (seen >= kWorker) {
      if (spin.again()) {
        seen = helpers.load(std::memory_order_acquire);
        continue;
      }
      seen = helpers.fetch_or(kAsleep) | kAsleep;
      if (seen < kWorker) break;
      pool.lend_core(*this);
      sleep_while(helpers, seen);
      seen = helpers.load(std::memory_order_acquire);
    }
  }
};

struct alignas(64) Pool::Worker {
  // Null: idle.
  std::atomic<Job*> job{nullptr};
  std::atomic<int64_t> index{0};  // of the job's body
  Word asleep{0};
  std::thread thread;
  std::atomic<ThreadId> id{0};  // known when it first runs
  std::atomic<const Job*> last{nullptr};
  std::atomic<int> kept_off{-1};  // the processor that it does not run on

  // In the place of a job, while a caller hands one over and while the worker is at it.
  static Job* taken() {
    static char place;
    return reinterpret_cast<Job*>(&place);
  }
};

Pool::Pool(int64_t cores, const Affinity& callers)
    : cores_(std::max<int64_t>(cores, 1)),
      allowed_(callers),
      workers_(static_cast<size_t>(cores_ - 1)) {}

Pool::~Pool() { stop(); }

void Pool::run(int64_t count, ParallelFor::Body body, void* arg) {
  if (count <= 1 || in_body || stopped_.load(std::memory_order_relaxed)) {
    for (int64_t i = 0; i < count; ++i) body(arg, i);
    return;
  }
  Job job(*this, body, arg, count);
  const int64_t others = callers_.fetch_add(1);
  const int64_t handed = hand_out(job, std::min(count, cores_ - others) - 1);
  {
    const InBody mark;
    calling_ = &job;
    job.next.store(handed + 1);
    job.run_from(0);
    // Taken back from those that have not come.
    for (int64_t i = 0, left = handed; left > 0 && i < started_.load(); ++i) {
      Worker& worker = *workers_[static_cast<size_t>(i)];
      Job* mine = &job;
      const int64_t index = worker.index;
      if (!worker.job.compare_exchange_strong(mine, nullptr)) continue;
      --left;
      job.run(index);
      job.leave();
    }
    calling_ = nullptr;
  }
  job.wait();
  callers_.fetch_sub(1);
  if (job.error != nullptr) std::rethrow_exception(job.error);
}

// Returns to how many: those of the bodies 1, 2, ...
int64_t Pool::hand_out(Job& job, int64_t wanted) {
  int64_t handed = 0;
  const int64_t started = started_.load(std::memory_order_acquire);
  for (int64_t i = 0; i < started && handed < wanted; ++i) {
    if (hand_to(*workers_[static_cast<size_t>(i)], job, handed + 1)) ++handed;
  }
  const bool may_start = started < static_cast<int64_t>(workers_.size());
  return handed < wanted && may_start ? start_workers(job, handed, wanted) : handed;
}

bool Pool::hand_to(Worker& worker, Job& job, int64_t index) const {
  Job* idle = nullptr;
  if (worker.job.load(std::memory_order_relaxed) != nullptr ||
      !worker.job.compare_exchange_strong(idle, Worker::taken())) {
    return false;
  }
  worker.index = index;
  worker.last.store(&job);
  keep_off(worker, job.core);
  job.helpers.fetch_add(Job::kWorker);
  worker.job.store(&job);
  if (worker.asleep.load() != 0 && worker.asleep.exchange(0) != 0) wake_one(worker.asleep);
  return true;
}

// Binds a worker to other processors than one. It is then woken on another, or goes there if it
// waits for its turn.
void Pool::keep_off(Worker& worker, int core) const {
  const ThreadId id = worker.id.load();
  if (id == 0 || worker.kept_off.exchange(core) == core) return;
  allowed_.bind_without(core, id);
}

void Pool::lend_core(const Job& job) const {
  for (int64_t i = 0; i < started_.load(); ++i) {
    Worker& worker = *workers_[static_cast<size_t>(i)];
    if (worker.last.load() == &job && worker.kept_off.exchange(-1) >= 0) allowed_.bind(worker.id);
  }
}

void Pool::take_core(Job& job) const {
  job.core = current_core();
  for (int64_t i = 0; i < started_.load(); ++i) {
    Worker& worker = *workers_[static_cast<size_t>(i)];
    if (worker.last.load() == &job) keep_off(worker, job.core);
  }
}

CoreLent::CoreLent() {
  if (const Pool::Job* const job = Pool::calling_) job->pool.lend_core(*job);
}
CoreLent::~CoreLent() {
  if (Pool::Job* const job = Pool::calling_) job->pool.take_core(*job);
}

// A thread that cannot be started is done without.
int64_t Pool::start_workers(Job& job, int64_t handed, int64_t wanted) {
  const std::lock_guard<std::mutex> lock(starting_);
  const SignalsBlocked blocked;  // in the threads that are started
  try {
    for (size_t i = static_cast<size_t>(started_.load());
         handed < wanted && i < workers_.size() && !stopped_.load(); ++i) {
      auto worker = std::make_unique<Worker>();
      Worker& started = *worker;
      started.thread = std::thread([this, &started] { work(started); });
      name_thread(started.thread);
      workers_[i] = std::move(worker);
      started_.store(static_cast<int64_t>(i) + 1, std::memory_order_release);
      if (hand_to(started, job, handed + 1)) ++handed;
    }
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  return handed;
}

// Null when the pool has been stopped.
Pool::Job* Pool::next_job(Worker& worker) const {
  for (Spin spin(kNextCall);;) {
    Job* const job = worker.job.load(std::memory_order_acquire);
    if (job != nullptr && job != Worker::taken()) return job;
    if (stopped_.load()) return nullptr;
    if (spin.again()) continue;
    worker.asleep.store(1);
    // Who hands over, or stops, looks for the sleeper after it has written what is read here.
    if (worker.job.load() == nullptr && !stopped_.load()) sleep_while(worker.asleep, 1);
    worker.asleep.store(0);
  }
}

void Pool::work(Worker& worker) const {
  worker.id.store(this_thread());
  bool is_new = true;
  while (Job* job = next_job(worker)) {
    Job* const mine = job;
    if (!worker.job.compare_exchange_strong(job, Worker::taken())) continue;  // taken back
    if (is_new) keep_off(worker, mine->core);  // its caller did not know it yet
    is_new = false;
    {
      const InBody mark;
      mine->run_from(worker.index);
    }
    // Idle before the caller goes on, for its next call.
    worker.job.store(nullptr);
    mine->leave();
  }
}

void Pool::stop() {
  stopped_.store(true);
  const std::lock_guard<std::mutex> lock(starting_);
  for (const std::unique_ptr<Worker>& worker : workers_) {
    if (worker == nullptr || !worker->thread.joinable()) continue;
    worker->asleep.store(0);
    wake_one(worker->asleep);
    if (worker->thread.get_id() == std::this_thread::get_id()) {
      worker->thread.detach();  // a body has ended the process
    } else {
      worker->thread.join();
    }
  }
}

}  // namespace snv2::cpu
