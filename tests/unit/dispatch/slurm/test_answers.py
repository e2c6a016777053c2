"""Slurm's answers, as its commands printed them (Slurm 22.05 unless said otherwise), and what they mean for a job."""

# ruff: noqa: E501  (texts as they were printed)
from __future__ import annotations

import pytest

from steps.dispatch.executors.slurm.answers import Files, Row, judge, lost, sacct_rows, scontrol_rows, squeue_rows

QUEUE = """\
5|CANCELLED|None|2026-11-22T06:44:43|2026-11-22T06:44:44|job-b8e32522.sh
7|CANCELLED|DependencyNeverSatisfied|N/A|2026-11-22T06:44:44|job-50acc70a.sh
15|CANCELLED|JobHeldUser|2026-11-22T06:44:42|2026-11-22T06:44:42|job-6ec19546.sh
1|COMPLETED|None|2026-11-22T06:44:43|2026-11-22T06:44:43|a b|'c
2|FAILED|NonZeroExitCode|2026-11-22T06:44:43|2026-11-22T06:44:43|job-d20ee06a.sh
3|FAILED|JobLaunchFailure|2026-11-22T06:44:43|2026-11-22T06:44:43|job-3cf6fc38.sh
6|PENDING|Dependency|N/A|N/A|job-b539f31f.sh
8|PENDING|DependencyNeverSatisfied|N/A|N/A|job-7f2c460f.sh
10|PENDING|BeginTime|2026-11-22T07:44:42|2026-11-22T07:54:42|job-b7933b9e.sh
17|PENDING|Resources|2026-11-22T06:54:43|2026-11-22T07:04:43|job-ab24c3b0.sh
18|PENDING|Priority|2026-11-22T07:04:00|2026-11-22T07:14:00|job-ae3cfaba.sh
9|PENDING|JobHeldUser|N/A|N/A|job-32a89db1.sh
22|PENDING|Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions|N/A|N/A|x
23|PENDING|QOSMaxJobsPerUserLimit|N/A|N/A|x
4|RUNNING|None|2026-11-22T06:44:43|2026-11-22T06:54:43|job-391ed2cc.sh
19|COMPLETING|None|2026-11-22T06:53:42|2026-11-22T06:53:43|stubborn
20|NODE_FAIL|NodeDown|2026-11-22T06:53:42|2026-11-22T06:53:44|nf
21|TIMEOUT|TimeLimit|2026-11-22T06:53:42|2026-11-22T06:54:11|to
24|CONFIGURING|None|2026-11-22T06:53:42|2026-11-22T06:54:11|x
25|SUSPENDED|None|2026-11-22T06:53:42|2026-11-22T06:54:11|x
"""


@pytest.mark.parametrize(
    ("number", "state", "reason"),
    [
        ("6", "pending", "Dependency"),
        ("8", "pending", "DependencyNeverSatisfied"),
        ("10", "pending", "BeginTime"),
        ("17", "pending", "Resources"),
        ("18", "pending", "Priority"),
        ("9", "pending", "JobHeldUser"),
        ("23", "pending", "QOSMaxJobsPerUserLimit"),
        ("24", "pending", "CONFIGURING"),
        ("4", "running", ""),
        ("19", "running", "COMPLETING"),
        ("25", "running", "SUSPENDED"),
        ("1", "succeeded", ""),
        ("5", "cancelled", "CANCELLED"),
        ("7", "cancelled", "DependencyNeverSatisfied"),
        ("15", "cancelled", "CANCELLED"),
        ("20", "failed", "NODE_FAIL"),
        ("21", "failed", "TIMEOUT"),
    ],
)
def test_the_queue_in_our_words(number, state, reason):
    (row,) = (row for row in squeue_rows(QUEUE) if row.id == number)
    status = judge(Files(), row)
    assert (status.state, status.reason) == (state, reason)


def test_a_reason_may_be_a_sentence_and_scontrol_writes_it_with_underscores():
    (row,) = (row for row in squeue_rows(QUEUE) if row.id == "22")
    shown = SHOWN["pending"].replace("Reason=Dependency", f"Reason={row.reason.replace(' ', '_')}")
    assert next(scontrol_rows(shown)).reason == row.reason
    assert judge(Files(), row).reason.startswith("Nodes required for job are DOWN, DRAINED")


def test_a_name_may_hold_the_separator():
    names = [row.name for row in squeue_rows(QUEUE)]
    assert "a b|'c" in names
    assert len(names) == len(QUEUE.splitlines())


def test_lines_that_are_no_jobs_are_not_read():
    assert not list(
        squeue_rows("slurm_load_jobs error: Invalid job id specified\n\nJOBID|STATE|REASON|START|END|NAME\n")
    )
    assert not list(sacct_rows("Slurm accounting storage is disabled\n"))
    assert not list(scontrol_rows("slurm_load_jobs error: Invalid job id specified\nNo jobs in the system\n"))


ACCOUNTING = """\
1|COMPLETED|0:0|None|2026-11-22T06:44:43|2026-11-22T06:44:43|a b|'c
2|FAILED|3:0|NonZeroExitCode|2026-11-22T06:44:43|2026-11-22T06:44:43|failed
3|FAILED|0:9|JobLaunchFailure|2026-11-22T06:44:43|2026-11-22T06:44:43|killed
4|RUNNING|0:0|None|2026-11-22T06:44:43|Unknown|running
5|CANCELLED by 1000|0:15|None|2026-11-22T06:44:43|2026-11-22T06:44:44|cancelled
6|PENDING|0:0|Dependency|Unknown|Unknown|waiting
7|CANCELLED|0:0|Dependency|None|2026-11-22T07:14:46|never
20|CANCELLED by 0|0:0|Dependency|None|2026-11-22T07:14:46|waited
8|OUT_OF_MEMORY|0:125|None|2026-11-22T06:44:43|2026-11-22T06:44:53|memory
9|TIMEOUT|0:15|TimeLimit|2026-11-22T06:53:42|2026-11-22T06:54:11|time
10|TIMEOUT|0:0|None|2026-11-22T06:53:42|2026-11-22T06:54:11|time
11|NODE_FAIL|0:0|NodeDown|2026-11-22T06:53:42|2026-11-22T06:53:44|node
12|NODE_FAIL|1:0|None|2026-11-22T06:53:42|2026-11-22T06:53:44|node
13|PREEMPTED|0:0|None|2026-11-22T06:53:42|2026-11-22T06:53:44|preempted
14|DEADLINE|0:0|None|Unknown|2026-11-22T06:53:44|deadline
15|BOOT_FAIL|0:0|None|2026-11-22T06:53:42|2026-11-22T06:53:44|boot
16|FAILED|0:53|JobLaunchFailure|2026-11-22T06:44:43|2026-11-22T06:44:43|unlaunched
17|FAILED|137:0|NonZeroExitCode|2026-11-22T06:44:43|2026-11-22T06:44:43|srun
18|REQUEUED|0:0|None|2026-11-22T06:44:43|2026-11-22T06:44:43|requeued
19|FAILED|0:0|AssociationJobLimit|2026-11-22T06:44:43|2026-11-22T06:44:43|odd
"""


@pytest.mark.parametrize(
    ("number", "state", "exit_code", "reason"),
    [
        ("1", "succeeded", 0, ""),
        ("2", "failed", 3, "exit code 3"),
        ("3", "failed", 137, "killed by signal 9"),
        ("4", "running", None, ""),
        ("5", "cancelled", 143, "CANCELLED by 1000"),
        ("6", "pending", None, "Dependency"),
        ("7", "cancelled", None, "DependencyNeverSatisfied"),
        ("20", "cancelled", None, "CANCELLED by 0"),
        ("8", "failed", 1, "OUT_OF_MEMORY"),
        ("9", "failed", 143, "TIMEOUT"),
        ("10", "failed", 1, "TIMEOUT"),
        ("11", "failed", 1, "NODE_FAIL"),
        ("12", "failed", 1, "NODE_FAIL"),
        ("13", "failed", 1, "PREEMPTED"),
        ("14", "failed", 1, "DEADLINE"),
        ("15", "failed", 1, "BOOT_FAIL"),
        ("16", "failed", 181, "JobLaunchFailure: Slurm could not start it (is its directory writable on the nodes?)"),
        ("17", "failed", 137, "killed by signal 9"),
        ("18", "pending", None, "REQUEUED"),
        ("19", "failed", 1, "AssociationJobLimit"),
    ],
)
def test_accounting_in_our_words(number, state, exit_code, reason):
    (row,) = (row for row in sacct_rows(ACCOUNTING) if row.id == number)
    status = judge(Files(), row)
    assert (status.state, status.exit_code, status.reason) == (state, exit_code, reason)


def test_times_are_of_when_it_ran_not_of_when_it_might():
    rows = {row.id: row for row in sacct_rows(ACCOUNTING)}
    assert judge(Files(), rows["2"]).ended_at == "2026-11-22T06:44:43+00:00"
    assert judge(Files(), rows["4"]).started_at == "2026-11-22T06:44:43+00:00"
    assert judge(Files(), rows["7"]).started_at == ""
    waiting = next(row for row in squeue_rows(QUEUE) if row.id == "10")  # squeue shows when it is expected to start
    assert judge(Files(), waiting).started_at == ""


SHOWN = {
    "cancelled": "JobId=5 JobName=job-b8e32522.sh UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901755 Nice=0 "
    "Account=(null) QOS=(null) JobState=CANCELLED Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 "
    "ExitCode=0:15 RunTime=00:00:01 TimeLimit=00:10:00 TimeMin=N/A SubmitTime=2026-11-22T06:44:42 "
    "EligibleTime=2026-11-22T06:44:42 AccrueTime=2026-11-22T06:44:42 StartTime=2026-11-22T06:44:43 "
    "EndTime=2026-11-22T06:44:44 Deadline=N/A SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-22T06:44:43 "
    "Scheduler=Backfill Partition=batch AllocNode:Sid=localhost:21896 ReqNodeList=(null) ExcNodeList=(null) NodeList=n2 "
    "BatchHost=n2 NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:* TRES=cpu=1,mem=100M,node=1,billing=1 "
    "Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=* MinCPUsNode=1 MinMemoryNode=100M MinTmpDiskNode=0 Features=(null) "
    "DelayBoot=00:00:00 OverSubscribe=YES Contiguous=0 Licenses=(null) Network=(null) Command=/tmp/s/job-b8e32522.sh "
    "WorkDir=/tmp/s StdErr=/tmp/s/5.out StdIn=/dev/null StdOut=/tmp/s/5.out Power= ",
    "never": "JobId=7 JobName=job-50acc70a.sh UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901753 Nice=0 "
    "Account=(null) QOS=(null) JobState=CANCELLED Reason=DependencyNeverSatisfied Dependency=afterok:2(failed) Requeue=1 "
    "Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=20779-06:44:44 TimeLimit=00:10:00 TimeMin=N/A "
    "SubmitTime=2026-11-22T06:44:42 EligibleTime=Unknown AccrueTime=Unknown StartTime=Unknown "
    "EndTime=2026-11-22T06:44:44 Deadline=N/A Power= KillOInInvalidDependent=Yes ",
    "pending": "JobId=6 JobName=a=b UserId= x UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901754 Nice=0 "
    "Account=(null) QOS=(null) JobState=PENDING Reason=Dependency Dependency=afterok:4(unfulfilled) Requeue=1 Restarts=0 "
    "BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:00 StartTime=Unknown EndTime=Unknown Deadline=N/A ",
    "node": "JobId=4 JobName=nf UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901756 Nice=0 Account=(null) "
    "QOS=(null) JobState=NODE_FAIL Reason=NodeDown Dependency=(null) Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 "
    "ExitCode=0:0 RunTime=00:00:02 StartTime=2026-11-22T06:53:42 EndTime=2026-11-22T06:53:44 Deadline=N/A ",
}


def test_scontrol_is_read_as_it_stands():
    assert list(scontrol_rows("\n".join(SHOWN.values()))) == [
        Row("5", "job-b8e32522.sh", "CANCELLED", "", 0, 15, "2026-11-22T06:44:43+00:00", "2026-11-22T06:44:44+00:00"),
        Row("7", "job-50acc70a.sh", "CANCELLED", "DependencyNeverSatisfied", 0, 0, "", "2026-11-22T06:44:44+00:00"),
        Row("6", "a=b UserId= x", "PENDING", "Dependency"),
        Row("4", "nf", "NODE_FAIL", "NodeDown", 0, 0, "2026-11-22T06:53:42+00:00", "2026-11-22T06:53:44+00:00"),
    ]


FILES = Files("8", "2026-11-22T06:44:40+00:00", "2026-11-22T06:44:50+00:00")


def test_a_jobs_own_success_is_final():
    """Whatever Slurm says: its commands lag behind, and what happens after the end is no part of the job."""
    for row in (None, *squeue_rows(QUEUE)):
        status = judge(Files("8", "then", "later", 0), row)
        assert (status.state, status.exit_code, status.started_at, status.ended_at) == ("succeeded", 0, "then", "later")


@pytest.mark.parametrize(
    ("code", "slurm", "state", "reason"),
    [
        (3, None, "failed", "exit code 3"),
        (137, None, "failed", "killed by signal 9"),
        (255, None, "failed", "exit code 255"),
        (3, Row("8", "x", "RUNNING"), "failed", "exit code 3"),
        (3, Row("8", "x", "FAILED", "NonZeroExitCode", 3), "failed", "exit code 3"),
        (137, Row("8", "x", "OUT_OF_MEMORY", "", 0, 125), "failed", "OUT_OF_MEMORY"),
        (143, Row("8", "x", "TIMEOUT", "TimeLimit"), "failed", "TIMEOUT"),
        (143, Row("8", "x", "CANCELLED by 7", "", 0, 15), "cancelled", "CANCELLED by 7"),
        (1, Row("8", "x", "NODE_FAIL"), "failed", "NODE_FAIL"),
        (1, Row("8", "x", "COMPLETED"), "failed", "exit code 1"),
    ],
)
def test_a_jobs_own_exit_code_stays_and_slurm_says_why(code, slurm, state, reason):
    status = judge(Files("8", FILES.started_at, FILES.ended_at, code), slurm)
    assert (status.state, status.exit_code, status.reason) == (state, code, reason)
    assert (status.started_at, status.ended_at) == (FILES.started_at, FILES.ended_at)


def test_nothing_known_is_no_status():
    assert judge(Files(), None) is None
    assert judge(Files("8", "2026-11-22T06:44:40+00:00"), None) is None
    assert lost("8", "name").reason == "Slurm no longer knows job 8, and it left no exit code"
    assert "no job named name" in lost("", "name").reason
