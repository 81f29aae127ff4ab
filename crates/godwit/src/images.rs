//! `godwit image …` over the cluster's local OCI store.

use crate::args::Image;
use anyhow::Context;
use godwit_images::{FileEntry, Store};
use godwit_standalone::Layout;
use std::path::{Path, PathBuf};

/// Carries out one image command.
pub async fn run(command: Image) -> anyhow::Result<()> {
    match command {
        Image::Build { data_dir, name, files } => {
            let files = files.iter().map(|pair| entry(pair)).collect::<anyhow::Result<Vec<_>>>()?;
            let image = store(&data_dir)?.build(&name, &files)?;
            println!("{name} {}", image.digest);
        }
        Image::Import { data_dir, archive, name } => {
            for image in store(&data_dir)?.import(&archive, name.as_deref())? {
                println!("{} {}", image.reference, image.digest);
            }
        }
        Image::List { data_dir } => {
            for image in store(&data_dir)?.list()? {
                println!("{:<48} {:>12} {}", image.reference, image.size, image.digest);
            }
        }
        Image::Remove { data_dir, name } => {
            anyhow::ensure!(store(&data_dir)?.remove(&name)?, "there is no image {name} in {}", data_dir.display());
            println!("{name} removed");
        }
    }
    Ok(())
}

fn store(data_dir: &Path) -> anyhow::Result<Store> {
    Ok(Store::open(Layout::open(data_dir)?.images())?)
}

fn entry(pair: &str) -> anyhow::Result<FileEntry> {
    let (source, destination) = pair.split_once(':').with_context(|| format!("{pair:?} is not SOURCE:DESTINATION"))?;
    let mode = std::fs::metadata(source).map(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 0o7777);
    let mode = mode.with_context(|| format!("cannot read {source}"))?;
    Ok(FileEntry { source: PathBuf::from(source), destination: destination.to_owned(), mode })
}
