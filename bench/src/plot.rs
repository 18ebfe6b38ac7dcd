//! Reports as pictures.

use std::fmt::{Display, Write as _};

use anyhow::{Result, anyhow};
use plotters::backend::SVGBackend;
use plotters::chart::{ChartBuilder, ChartContext, LabelAreaPosition};
use plotters::coord::Shift;
use plotters::coord::cartesian::Cartesian2d;
use plotters::coord::types::RangedCoordf64;
use plotters::drawing::{DrawingArea, IntoDrawingArea as _};
use plotters::element::{Circle, PathElement, Rectangle, Text};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color as _, IntoFont as _, RGBColor, ShapeStyle, TextStyle, WHITE};

use crate::report::{Of, Panel, Report, Series, number};
use crate::table::reach_cell;

const WIDTH: u32 = 960;
const HEADER: u32 = 66;
const LINES_HEIGHT: u32 = 260;
/// Above the axes of a panel: its title, and its legend.
const TITLE: u32 = 30;
const LEGEND: u32 = 20;
/// Below them, with and without a name.
const NAMED_AXIS: u32 = 46;
const AXIS: u32 = 32;
const BAR: u32 = 20;
const GAP: u32 = 8;
/// What a letter takes at most, of the size that labels have.
const LETTER: u32 = 7;

const TEXT: RGBColor = RGBColor(0x24, 0x29, 0x2f);
const FAINT: RGBColor = RGBColor(0x6e, 0x77, 0x81);
const MESH: RGBColor = RGBColor(0xe4, 0xe7, 0xeb);
const MISSED: RGBColor = RGBColor(0xcf, 0x22, 0x2e);
/// Okabe and Ito's colours, which people who do not see all colours tell apart as well.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0xd5, 0x5e, 0x00),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// The picture of a report, as SVG.
pub(crate) fn svg(report: &Report) -> Result<String> {
    let rows = rows(&report.panels);
    let heights: Vec<_> = rows.iter().map(|row| height(row[0])).collect();
    let mut svg = String::new();
    {
        let size = (WIDTH, HEADER + heights.iter().sum::<u32>());
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(error)?;
        let (header, mut rest) = root.split_vertically(HEADER);
        put(&header, &report.title, (16, 12), &style(20.0, TEXT))?;
        let quick = if report.quick { " (a quick look only)" } else { "" };
        let Report { machine, repetitions, .. } = report;
        let line = format!(
            "{}, {} cores, Linux {}; {} ({}); medians of {repetitions} repetitions{quick}",
            machine.cpu, machine.cores, machine.kernel, machine.vxcsum, machine.commit
        );
        put(&header, &line, (16, 40), &style(12.0, FAINT))?;
        for (row, height) in rows.into_iter().zip(heights) {
            let (area, below) = rest.split_vertically(height);
            let areas = area.split_evenly((1, row.len()));
            for (panel, area) in row.iter().zip(areas) {
                if panel.axis.is_some() {
                    lines(&area, panel)?;
                } else {
                    bars(&area, panel)?;
                }
            }
            rest = below;
        }
        root.present().map_err(error)?;
    }
    Ok(svg)
}

/// Panels of lines stand two in a row. Where all is zero there is nothing to see.
fn rows(panels: &[Panel]) -> Vec<Vec<&Panel>> {
    let mut rows: Vec<Vec<&Panel>> = Vec::new();
    let is_seen = |panel: &&Panel| panel.series.iter().any(|series| series.max != 0.0);
    for panel in panels.iter().filter(is_seen) {
        match rows.last_mut() {
            Some(row) if panel.axis.is_some() && row.len() == 1 && row[0].axis.is_some() => {
                row.push(panel);
            }
            _ => rows.push(vec![panel]),
        }
    }
    rows
}

fn height(panel: &Panel) -> u32 {
    if panel.axis.is_some() {
        return LINES_HEIGHT;
    }
    let legend = if variants(panel).is_empty() { 0 } else { LEGEND };
    let (bars, groups) = (panel.series.len() as u32, names(panel).len() as u32);
    TITLE + legend + bars * BAR + groups * GAP + AXIS
}

fn bars(area: &Area<'_>, panel: &Panel) -> Result<()> {
    let (variants, names) = (variants(panel), names(panel));
    let legend = if variants.is_empty() { 0 } else { LEGEND };
    let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or_default();
    let left = (longest as u32 * LETTER + 24).clamp(120, 420);
    let height = panel.series.len() as u32 * BAR + names.len() as u32 * GAP;
    put(area, &title(panel), (16, 4), &style(15.0, TEXT))?;
    draw_legend(area, &variants)?;
    // Room for what stands behind the longest bar.
    let most = panel.series.iter().map(|series| series.max).fold(0.0, f64::max);
    let most = if most > 0.0 { most * 1.45 } else { 1.0 };
    let mut chart = ChartBuilder::on(area)
        .margin_top(TITLE + legend)
        .margin_right(16)
        .set_label_area_size(LabelAreaPosition::Left, left)
        .set_label_area_size(LabelAreaPosition::Bottom, AXIS)
        .build_cartesian_2d(0.0..most, f64::from(height)..0.0)
        .map_err(error)?;
    mesh(&mut chart, None, |_| String::new())?;

    let label = style(13.0, TEXT).pos(Pos::new(HPos::Right, VPos::Center));
    let mut y = f64::from(GAP) / 2.0;
    for name in names {
        let group: Vec<_> = panel.series.iter().filter(|series| series.name == name).collect();
        let tall = f64::from(BAR) * group.len() as f64;
        let middle = f64::from(TITLE + legend) + y + tall / 2.0;
        put(area, name, (left.cast_signed() - 8, middle as i32), &label)?;
        for series in group {
            let colour = colour(&variants, series);
            draw_bar(&mut chart, series, y, colour)?;
            y += f64::from(BAR);
        }
        y += f64::from(GAP);
    }
    Ok(())
}

fn draw_bar(chart: &mut Chart<'_, '_>, series: &Series, y: f64, colour: RGBColor) -> Result<()> {
    let (top, bottom, middle) = (y + 3.0, y + 17.0, y + 10.0);
    let bar = Rectangle::new([(0.0, top), (series.median, bottom)], colour.filled());
    chart.draw_series([bar]).map_err(error)?;
    let thin = ShapeStyle::from(&TEXT).stroke_width(1);
    let whisker = [(series.min, middle), (series.max, middle)];
    chart.draw_series([PathElement::new(whisker, thin)]).map_err(error)?;
    let mut text = number(series.median);
    if let Some(ratio) = &series.ratio {
        let _ = write!(text, "  ({:.3})", ratio.median);
    }
    let mut text_colour = TEXT;
    if let Some(reach) = series.reach {
        let _ = write!(text, "  to reach {}", reach_cell(reach));
        if !reach.met {
            text_colour = MISSED;
        }
        if reach.of == Of::Median && reach.limit <= chart.x_range().end {
            let mark = [(reach.limit, y), (reach.limit, y + f64::from(BAR))];
            let thick = ShapeStyle::from(&MISSED).stroke_width(2);
            chart.draw_series([PathElement::new(mark, thick)]).map_err(error)?;
        }
    }
    let behind = match series.reach {
        // Not on the mark.
        Some(reach) if reach.of == Of::Median && reach.limit < chart.x_range().end * 0.6 => {
            series.max.max(reach.limit)
        }
        _ => series.max,
    };
    let place = style(12.0, text_colour).pos(Pos::new(HPos::Left, VPos::Center));
    // SVG swallows a space at the start.
    let gap = chart.x_range().end / 150.0;
    let text = Text::new(text, (behind + gap, middle), place);
    chart.draw_series([text]).map_err(error)?;
    Ok(())
}

fn lines(area: &Area<'_>, panel: &Panel) -> Result<()> {
    let variants = variants(panel);
    let legend = if variants.is_empty() { 0 } else { LEGEND };
    put(area, &title(panel), (16, 4), &style(15.0, TEXT))?;
    draw_legend(area, &variants)?;
    // Evenly spaced: each is a multiple of the one before.
    let mut places: Vec<_> = panel.series.iter().filter_map(|series| series.at).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    let last = places.len().saturating_sub(1) as f64;
    let most = panel.series.iter().map(|series| series.max).fold(0.0, f64::max);
    let most = if most > 0.0 { most * 1.1 } else { 1.0 };
    let mut chart = ChartBuilder::on(area)
        .margin_top(TITLE + legend)
        .margin_right(24)
        .set_label_area_size(LabelAreaPosition::Left, 68)
        .set_label_area_size(LabelAreaPosition::Bottom, NAMED_AXIS)
        .build_cartesian_2d(-0.2..last + 0.2, 0.0..most)
        .map_err(error)?;
    let names: Vec<_> = places.iter().copied().map(number).collect();
    mesh(&mut chart, panel.axis.as_deref(), |at| {
        // Ticks between places have no name.
        let is_at = |(index, _): &(usize, &String)| (at - *index as f64).abs() < 1e-6;
        names.iter().enumerate().find(is_at).map(|(_, name)| name.clone()).unwrap_or_default()
    })?;

    let all = if variants.is_empty() { vec![None] } else { variants.iter().map(Some).collect() };
    for variant in all {
        let on_it = panel.series.iter().filter(|series| series.variant.as_ref() == variant);
        let points: Vec<_> = on_it
            .filter_map(|series| {
                let at = series.at?;
                let index = places.iter().position(|place| place.total_cmp(&at).is_eq())?;
                Some((index as f64, series))
            })
            .collect();
        let Some((_, first)) = points.first() else { continue };
        let colour = colour(&variants, first);
        let line: Vec<_> = points.iter().map(|(x, series)| (*x, series.median)).collect();
        let thick = ShapeStyle::from(&colour).stroke_width(2);
        chart.draw_series([PathElement::new(line, thick)]).map_err(error)?;
        for (x, series) in points {
            let thin = ShapeStyle::from(&colour).stroke_width(1);
            let whisker = [(x, series.min), (x, series.max)];
            chart.draw_series([PathElement::new(whisker, thin)]).map_err(error)?;
            let dot = Circle::new((x, series.median), 3, colour.filled());
            chart.draw_series([dot]).map_err(error)?;
        }
    }
    Ok(())
}

/// Axes: of bars only the one below, and of lines, where that one has a name, both. The unit stands in
/// the title.
fn mesh(chart: &mut Chart<'_, '_>, x: Option<&str>, name: impl Fn(f64) -> String) -> Result<()> {
    let x_name = |at: &f64| if x.is_some() { name(*at) } else { number(*at) };
    let y_name = |at: &f64| number(*at);
    let mut mesh = chart.configure_mesh();
    mesh.x_label_formatter(&x_name)
        .y_label_formatter(&y_name)
        .label_style(style(12.0, FAINT))
        .axis_desc_style(style(12.0, FAINT))
        .axis_style(MESH)
        .bold_line_style(MESH)
        .light_line_style(WHITE);
    match x {
        Some(x) => mesh.x_desc(x).y_labels(6),
        None => mesh.disable_y_mesh().disable_y_axis(),
    };
    mesh.draw().map_err(error)
}

fn draw_legend(area: &Area<'_>, variants: &[String]) -> Result<()> {
    let mut x = 16;
    for (variant, colour) in variants.iter().zip(COLOURS.iter().cycle()) {
        let y = TITLE.cast_signed() - 2;
        area.draw(&Rectangle::new([(x, y), (x + 12, y + 12)], colour.filled())).map_err(error)?;
        put(area, variant, (x + 18, y - 1), &style(12.0, TEXT))?;
        x += 36 + (variant.chars().count() as u32 * LETTER).cast_signed();
    }
    Ok(())
}

fn title(panel: &Panel) -> String {
    format!("{}, {}", panel.title, panel.unit)
}

/// Names in order, each once.
fn names(panel: &Panel) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for series in &panel.series {
        if !names.contains(&series.name.as_str()) {
            names.push(&series.name);
        }
    }
    names
}

/// Variants in order, each once.
fn variants(panel: &Panel) -> Vec<String> {
    let mut variants: Vec<String> = Vec::new();
    for variant in panel.series.iter().filter_map(|series| series.variant.as_ref()) {
        if !variants.contains(variant) {
            variants.push(variant.clone());
        }
    }
    variants
}

fn colour(variants: &[String], series: &Series) -> RGBColor {
    let index = variants.iter().position(|variant| Some(variant) == series.variant.as_ref());
    COLOURS[index.unwrap_or_default() % COLOURS.len()]
}

fn style(size: f64, colour: RGBColor) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&colour)
}

fn put(area: &Area<'_>, text: &str, at: (i32, i32), style: &TextStyle<'_>) -> Result<()> {
    area.draw_text(text, style, at).map_err(error)
}

/// Its error type names the backend and borrows.
fn error(error: impl Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}
