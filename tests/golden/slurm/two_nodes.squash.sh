#!/bin/bash
#SBATCH --job-name=20260102-030405-peft-megatron_bridge-0a1b2c-image
#SBATCH --account=llm
#SBATCH --partition=backfill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=12:00:00
#SBATCH --gpus-per-node=8
#SBATCH --chdir=/lustre/ada/jobs/jobs/20260102-030405-peft-megatron_bridge-0a1b2c
#SBATCH --output=/lustre/ada/jobs/jobs/20260102-030405-peft-megatron_bridge-0a1b2c/log
#SBATCH --open-mode=append

image='docker://nvcr.io#nvidia/nemo:25.11'
squash=/lustre/ada/jobs/squash/nvcr.io+nvidia+nemo=25.11.sqsh
command -v enroot > /dev/null || {
    echo "note: no enroot on $(hostname): the image is not imported beforehand"
    exit 0
}
mkdir -p "$(dirname "$squash")" || exit 1
new=$squash.$SLURM_JOB_ID
trap 'rm -f "$new"' EXIT
echo "importing $image as $squash"
enroot import --output "$new" "$image" && mv "$new" "$squash"
